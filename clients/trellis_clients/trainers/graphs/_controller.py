"""L2-GCN's learned controller: when is a layer trained enough?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

WIDTH = 8
"""Numbers that the controller takes in, and numbers that it remembers."""


class Memory(NamedTuple):
    """What the controller has seen: hidden and cell state, ``(WIDTH,)`` each, decisions made, and the last action."""

    hidden: Tensor
    cell: Tensor
    decisions: int
    action: int


class Controller(nn.Module):
    """An LSTM that looks at the loss every few epochs and says how likely it would stop the layer.

    Args:
        layers: L, at most 6: an input is L + 1 numbers on loss and layer, and 7 - L on the last decision.
        most: decisions over all layers.
    """

    def __init__(self, layers: int, most: int) -> None:
        super().__init__()
        self.layers, self.most = layers, most
        self.cell = nn.LSTMCell(WIDTH, WIDTH)
        self.past = nn.Embedding(2 * most, WIDTH - 1 - layers)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(most))

    def fresh(self) -> Memory:
        """Return the memory before the first decision."""
        nothing = self.past.weight.new_zeros(WIDTH)
        return Memory(nothing, nothing, 0, 0)

    def features(self, change: float, layer: int, memory: Memory) -> Tensor:
        """Return the input of a decision, ``(WIDTH,)``.

        Args:
            change: the loss less the loss that the layer began with.
            layer: from 0.
            memory: of the decisions so far.
        """
        losses = torch.full((self.layers + 1,), change + 1.0, device=self.past.weight.device)
        losses[layer + 1] = 1.0
        row = torch.tensor(2 * memory.decisions + memory.action, device=losses.device)
        return torch.cat([0.1 * losses, self.past(row)])

    def forward(self, change: float, layer: int, memory: Memory) -> tuple[Tensor, Memory]:
        """Return log-probabilities of (continue, stop), ``(2,)``, and the memory without the action yet."""
        hidden, cell = self.cell(self.features(change, layer, memory), (memory.hidden, memory.cell))
        logits = self.heads[memory.decisions](hidden)
        return logits.log_softmax(0), memory._replace(hidden=hidden, cell=cell)


def took(memory: Memory, action: int) -> Memory:
    """Return the memory after an action: 0 to continue, 1 to stop."""
    return memory._replace(decisions=memory.decisions + 1, action=action)
