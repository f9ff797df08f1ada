"""Pieces of few-shot class-incremental learners: the ResNet-12 of that field, and the neck behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Three 3x3 convolutions with batch norm, a 1x1 shortcut, and 2x2 max-pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        widths = (inputs, outputs, outputs, outputs)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(3))
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = norm(conv(out))
            if number < 2:
                out = F.leaky_relu(out, 0.1)
        return F.max_pool2d(F.leaky_relu(out + self.shortcut(x), 0.1), 2)


class ResNet12(nn.Sequential):
    """The ResNet-12 of few-shot learning up to its last maps, one block a width; no pooling and no head.

    Maps ``(n, channels, H, W)`` to ``(n, widths[-1], H / 2**blocks, W / 2**blocks)``. With the published widths
    (64, 160, 320, 640) on three channels it has 12,424,320 weights.
    """

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        inputs = (channels, *widths[:-1])
        super().__init__(*(Block(a, b) for a, b in zip(inputs, widths, strict=True)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")


class Neck(nn.Module):
    """From maps ``(n, C, h, w)`` to features ``(n, D)``: a perceptron with layer norms beside a linear shortcut."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        hidden = 2 * channels
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.LayerNorm(hidden),
            nn.LeakyReLU(0.1),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.LeakyReLU(0.1),
            nn.Linear(hidden, dim, bias=False),
        )
        self.shortcut = nn.Linear(channels, dim, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        pooled = maps.mean((2, 3))
        out: Tensor = self.mlp(pooled) + self.shortcut(pooled)
        return out


def simplex_etf(dim: int, classes: int, generator: torch.Generator) -> Tensor:
    """Return a simplex equiangular tight frame, float32 ``(dim, classes)``: unit columns, cosine -1/(classes - 1).

    M = sqrt(K / (K - 1)) U (I - 11'/K) with U of orthonormal columns, drawn in double precision. Needs dim >= classes.
    """
    basis = torch.linalg.qr(torch.randn(dim, classes, dtype=torch.float64, generator=generator)).Q
    centring = torch.eye(classes, dtype=torch.float64) - 1 / classes
    frame: Tensor = math.sqrt(classes / (classes - 1)) * basis @ centring
    return frame.float()
