"""Remapping tuning: the frozen encoder's knowledge is passed on to a small network beside it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trellis.models.zoo.small_cnn import SmallCnnClassifier
from trellis.models.zoo.vit import Block
from trellis_clients.trainers.tuning._encoder import Encoder, zeros

TEMPERATURE = 0.1
"""Of the ladder's gates, as published."""


class Ladder(nn.Module):
    """Ladder side-tuning (Sung et al., NeurIPS 2022): a narrow transformer on the encoder's states.

    Before its block l the side state is ``g_l * down_l(f_l) + (1 - g_l) * h``, where f_l is the encoder's state after
    block l and ``g_l = sigmoid(theta_l / 0.1)``; f_0, the embedding, is the first h. The side's class token, brought
    back to the encoder's width, is the feature. Nothing of the encoder is kept for a backward pass.

    The authors' code starts the side network from pruned weights of the encoder where it is told to
    (``load_side_pretrained_weights``, as its scripts for the published figures do); here it starts from nothing, for
    which the ladder is to be expected to do worse with few labels.
    """

    def __init__(self, base: Encoder, reduction: int) -> None:
        super().__init__()
        self.base = base
        width, depth = max(base.width // reduction, 1), len(base.blocks)
        self.down = nn.ModuleList(nn.Linear(base.width, width) for _ in range(depth + 1))
        self.gates = zeros(depth)
        self.side = nn.ModuleList(Block(width, math.gcd(width, 4), 2) for _ in range(depth))
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, base.width)

    def gate(self, number: int) -> Tensor:
        return torch.sigmoid(self.gates[number] / TEMPERATURE)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            state = self.base.embed(x)
        side = self.down[0](state)
        for number, (block, own) in enumerate(zip(self.base.blocks, self.side, strict=True)):
            with torch.no_grad():
                state = block(state)
            gate = self.gate(number)
            side = own(gate * self.down[number + 1](state) + (1 - gate) * side)
        out: Tensor = self.up(self.norm(side[:, 0]))
        return out


class Side(nn.Module):
    """Side-tuning (Zhang et al., ECCV 2020): ``a B(x) + (1 - a) S(x)``, a = sigmoid(theta).

    B is the frozen encoder, S a small convolutional network from scratch.
    """

    def __init__(self, base: Encoder, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.base = base
        channels, height, side = shape
        self.side = SmallCnnClassifier((channels, height, side), base.width, width, 2, 4 * width, "none")
        self.gate = zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.base(x)
        share = torch.sigmoid(self.gate)
        out: Tensor = share * features + (1 - share) * self.side(x)
        return out
