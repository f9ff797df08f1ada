"""Adapter tuning: small bottlenecks inside the blocks."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from trellis_clients.trainers.tuning._encoder import Encoder, attended, digested


class Bottleneck(nn.Module):
    """``scale * up(dropout(relu(down(x))))``. ``up`` starts at zero, so that at first nothing is added."""

    def __init__(self, width: int, inner: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        self.scale, self.dropout = scale, nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for values in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(values)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale * self.up(self.dropout(F.relu(self.down(x))))
        return out


class Parallel(nn.Module):
    """AdaptFormer (Chen et al., NeurIPS 2022): beside the MLP, on its input before the norm."""

    def __init__(self, block: nn.Module, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.block, self.adapter = block, bottleneck

    def forward(self, x: Tensor) -> Tensor:
        x = attended(self.block, x)
        out: Tensor = x + digested(self.block, x) + self.adapter(x)
        return out


class Sequential(nn.Module):
    """Pfeiffer et al. (EACL 2021): the bottleneck after the MLP, around a shortcut of its own."""

    def __init__(self, block: nn.Module, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.block, self.adapter = block, bottleneck

    def forward(self, x: Tensor) -> Tensor:
        x = attended(self.block, x)
        h = digested(self.block, x)
        out: Tensor = x + h + self.adapter(h)
        return out


def adapted(base: Encoder, parallel: bool, inner: int, scale: float, dropout: float) -> Encoder:
    """Give every block of an encoder a bottleneck, in place."""
    kind = Parallel if parallel else Sequential
    for number, block in enumerate(base.blocks):
        base.blocks[number] = kind(block, Bottleneck(base.width, inner, scale, dropout))
    return base
