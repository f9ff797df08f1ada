"""The trajectory loss of SAF and MESA, and SAF's memory of the outputs it compares with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trellis.data.base import Split
from trellis_clients.trainer import TrainerConfig

ABSENT = torch.iinfo(torch.int64).min


def trajectory_loss(outputs: Tensor, past: Tensor, temperature: float, known: Tensor | None = None) -> Tensor:
    """Return the mean over examples of KL( softmax(past / tau) || softmax(outputs / tau) ), past outputs the target.

    Args:
        outputs: logits ``(n, classes, ...)`` of the model in training; gradients flow through these alone.
        past: logits of the same shape.
        temperature: tau. There is no factor tau² to make up for it, as in the paper.
        known: bool ``(n,)``, which examples have a past; the mean is over these, and zero where there are none.
    """
    target = (past.detach() / temperature).softmax(1)
    each = F.kl_div((outputs / temperature).log_softmax(1), target, reduction="none").sum(1)
    each = each.flatten(1).mean(1) if each.dim() > 1 else each
    if known is None:
        return each.mean()
    return torch.where(known, each, 0).sum() / known.sum().clamp(min=1)


def examples_an_epoch(split: Split, config: TrainerConfig) -> int:
    """Return how many examples one pass over a split sees: all, less a last batch that is left out."""
    count, size = len(split), config.batch_size
    return count - count % size if config.drop_last and count > size else count


class Memory:
    """The logits of a client's n examples in each of its last E~ epochs: a ring of E~ · n · classes numbers.

    Every number carries the epoch it is from, so an example that an epoch left out is absent there and nowhere else.

    Attributes:
        epoch: the client's own epochs so far, the running one included, over all rounds it took part in.
    """

    def __init__(self, lookback: int, examples: int, device: torch.device, epoch: int = 0) -> None:
        self.epoch = epoch
        self.lookback = lookback
        self.rounds = [0] * lookback  # of the epoch in each slot
        self.epochs = torch.full((lookback, examples), ABSENT, device=device)
        self.outputs: Tensor | None = None  # their shape is known with the first
        self.usable = False

    def __len__(self) -> int:
        return self.epochs.shape[1]

    def begin(self, number: int, max_age: int | None = None) -> None:
        """Start the client's next epoch, in a round. Records older than ``max_age`` rounds are not used in it."""
        self.epoch += 1
        slot = self.epoch % self.lookback
        self.usable = max_age is None or number - self.rounds[slot] <= max_age
        self.rounds[slot] = number

    def exchange(self, index: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Keep this epoch's outputs of the examples at ``index``; return those of E~ epochs ago.

        Returns:
            ``(past, known)``: logits like ``outputs``, and bool ``(n,)`` that says which of them there are.
        """
        outputs = outputs.detach()
        if self.outputs is None:
            self.outputs = outputs.new_zeros(*self.epochs.shape, *outputs.shape[1:])
        slot = self.epoch % self.lookback
        known = (self.epochs[slot, index] == self.epoch - self.lookback) & self.usable
        past = self.outputs[slot, index]
        self.outputs[slot, index] = outputs
        self.epochs[slot, index] = self.epoch
        return past, known

    def state(self) -> dict[str, Any]:
        """Return what a client keeps of it between rounds."""
        kept: dict[str, Any] = {"epoch": self.epoch, "rounds": self.rounds, "epochs": self.epochs}
        return kept if self.outputs is None else {**kept, "outputs": self.outputs}

    def load(self, kept: dict[str, Any]) -> None:
        """Take up what ``state`` returned."""
        self.epoch, self.rounds, self.epochs = kept["epoch"], list(kept["rounds"]), kept["epochs"]
        self.outputs = kept.get("outputs")
