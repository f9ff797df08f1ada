"""One depthwise kernel that holds all candidate operations of a layer, and the networks made of such layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OPTIONS = ("skip", "3x3-e3", "3x3-e6", "5x5-e3", "5x5-e6")
EXPANSION = 6


class Decisions(NamedTuple):
    """Three indicators of a layer, scalars 0 or 1: the outer ring, any kernel at all, the second half of channels."""

    ring: Tensor
    half: Tensor
    full: Tensor

    def option(self) -> str:
        """Return the operation they stand for."""
        if not bool(self.half):
            return "skip"
        return f"{'5x5' if bool(self.ring) else '3x3'}-{'e6' if bool(self.full) else 'e3'}"


@dataclass(frozen=True)
class Place:
    """Where a searchable layer stands: its widths, its stride, and ``(height, width)`` of what it is given."""

    inputs: int
    outputs: int
    stride: int
    size: tuple[int, int]

    @property
    def skippable(self) -> bool:
        return self.stride == 1 and self.inputs == self.outputs

    @property
    def size_after(self) -> tuple[int, int]:
        height, width = self.size
        return math.ceil(height / self.stride), math.ceil(width / self.stride)

    def macs(self, kernel: int, expansion: int) -> float:
        """Return thousands of multiply-accumulates of one operation on an image of ``size``; norms are not counted."""
        middle, before, after = expansion * self.inputs, math.prod(self.size), math.prod(self.size_after)
        expand, project = before * self.inputs * middle, after * middle * self.outputs
        return (expand + after * middle * kernel**2 + project) / 1000


def indicator(x: Tensor) -> Tensor:
    """Return 1 where x >= 0 and 0 elsewhere, with the gradient of a sigmoid."""
    soft = x.sigmoid()
    return (x >= 0).to(x.dtype) + (soft - soft.detach())


class SuperKernel(nn.Module):
    """A 5x5 depthwise kernel ``(C, 1, 5, 5)`` and the thresholds that say which parts of it are used.

    Attributes:
        thresholds: of the ring of a 5x5 kernel, the first and the second half of the channels; they start at zero.
    """

    inner: Tensor

    def __init__(self, channels: int, skippable: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 5, 5))
        self.thresholds = nn.Parameter(torch.zeros(3))
        self.skippable = skippable
        inner = torch.zeros(1, 1, 5, 5)
        inner[..., 1:4, 1:4] = 1
        self.register_buffer("inner", inner, persistent=False)
        nn.init.normal_(self.weight, std=0.05)  # norms of the order of one: near the thresholds

    def forward(self, keep: float = 1.0) -> tuple[Tensor, Decisions]:
        """Return the kernel as used and what was decided. ``keep`` below 1 drops indicators, for the warm-up."""
        w, half = self.weight, len(self.weight) // 2
        centre, outer = w * self.inner, w * (1 - self.inner)
        ring = dropped(indicator(outer.norm() - self.thresholds[0]), keep)
        masked = centre + ring * outer
        first, second = masked[:half], masked[half:]
        full = dropped(indicator(second.norm() - self.thresholds[2]), keep)
        any_kernel = torch.ones_like(full)
        if self.skippable:
            any_kernel = dropped(indicator(first.norm() - self.thresholds[1]), keep)
        return any_kernel * torch.cat([first, full * second]), Decisions(ring, any_kernel, full)


def dropped(value: Tensor, keep: float) -> Tensor:
    """Return a value or, with probability 1 - keep, zero; what is left is scaled by 1 / keep."""
    return value if keep >= 1 else value * (torch.rand_like(value) < keep) / keep


def latency(decisions: Decisions, row: Sequence[float]) -> Tensor:
    """Return a layer's latency for its row of the table: 3x3-e3, 3x3-e6, 5x5-e3, 5x5-e6."""
    _, small6, large3, large6 = row
    share = small6 / large6
    of_channels = decisions.half * (large3 + decisions.full * (large6 - large3))
    return of_channels * share + of_channels * (1 - share) * decisions.ring


class Layer(nn.Module):
    """Inverted bottleneck: 1x1 expansion, depthwise kernel, 1x1 projection, a shortcut where widths allow.

    Args:
        option: the operation; None makes it searchable.
    """

    def __init__(self, place: Place, option: str | None) -> None:
        super().__init__()
        expansion = EXPANSION if option is None else int(option[-1])
        middle = expansion * place.inputs
        self.expand = nn.Sequential(nn.Conv2d(place.inputs, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU())
        self.stride, self.shortcut = place.stride, place.skippable
        if option is None:
            self.kernel: nn.Module = SuperKernel(middle, place.skippable)
        else:
            size = int(option[0])
            self.kernel = nn.Conv2d(middle, middle, size, place.stride, size // 2, groups=middle, bias=False)
        self.norm = nn.Sequential(nn.BatchNorm2d(middle), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(middle, place.outputs, 1, bias=False), nn.BatchNorm2d(place.outputs))

    def forward(self, x: Tensor, keep: float = 1.0) -> tuple[Tensor, Decisions | None]:
        wide, decisions = self.expand(x), None
        if isinstance(self.kernel, SuperKernel):
            kernel, decisions = self.kernel(keep)
            wide = F.conv2d(wide, kernel, stride=self.stride, padding=2, groups=len(kernel))
        else:
            wide = self.kernel(wide)
        out = self.project(self.norm(wide))
        return (out + x if self.shortcut else out), decisions


class Network(nn.Module):
    """Stem, layers, pooling and a head: searchable, or one found network."""

    def __init__(self, channels: int, classes: int, places: Sequence[Place], found: Sequence[str] | None) -> None:
        super().__init__()
        stem = places[0].inputs
        self.stem = nn.Sequential(nn.Conv2d(channels, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        options: Sequence[str | None] = [None] * len(places) if found is None else found
        kept = [(place, option) for place, option in zip(places, options, strict=True) if option != "skip"]
        self.layers = nn.ModuleList(Layer(place, option) for place, option in kept)
        self.head = nn.Linear(places[-1].outputs, classes)

    def run(self, x: Tensor, keep: float = 1.0) -> tuple[Tensor, list[Decisions]]:
        """Return logits and what every searchable layer decided."""
        x, decided = self.stem(x), []
        for layer in self.layers:
            x, decisions = layer(x, keep)
            if decisions is not None:
                decided.append(decisions)
        return self.head(x.mean((2, 3))), decided

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)[0]
