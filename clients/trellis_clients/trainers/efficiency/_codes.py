"""Tensors in codes of a few bits each, under ranges that follow them from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DECAY = 0.9
SMALLEST = 1e-12


@dataclass(frozen=True)
class Layout:
    """How a tensor falls into groups: as ``(outer, groups * inner)``, in its own order, ``inner`` values of a group.

    Attributes:
        groups: G.
        inner: values of one group that stand side by side.
    """

    groups: int
    inner: int

    @classmethod
    def of(cls, shape: torch.Size, groups: int, heads: int | None) -> Layout:
        """Return the layout of a tensor whose groups are one of these.

        A head of ``(B, H, r, c)`` or ``(B*H, r, c)``, some channels of a map ``(B, C, h, w)``, or a piece of the last
        axis of anything else. ``groups`` divides the channels.
        """
        if heads is not None:
            return cls(heads, math.prod(shape[-2:]))
        return cls(groups, math.prod(shape[1:] if len(shape) == 4 else shape[-1:]) // groups)

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.groups * self.inner)

    def by_column(self, values: Tensor) -> Tensor:
        """Return values ``(G,)`` for every column of ``rows``."""
        return values[:, None].expand(-1, self.inner).reshape(-1)


@dataclass
class Range:
    """Running range of one saved tensor, a value for each of its G groups.

    Attributes:
        alpha: maximum less minimum, float32 ``(G,)``.
        beta: minimum, float32 ``(G,)``.
        steps: forward passes seen.
    """

    alpha: Tensor
    beta: Tensor
    steps: int = 0

    def update(self, x: Tensor, layout: Layout, decay: float) -> None:
        """Take in a tensor. The first one is taken as it is, so that none of its values is clipped."""
        # Every column first: over a short last axis, and by one call for both ends, it takes several times as long.
        rows = layout.rows(x)
        low, high = rows.amin(0).view(layout.groups, -1).amin(1), rows.amax(0).view(layout.groups, -1).amax(1)
        if self.steps:
            # New tensors: what earlier passes kept is read under the range it was made under.
            self.alpha = torch.lerp(self.alpha, high - low, 1 - decay)
            self.beta = torch.lerp(self.beta, low, 1 - decay)
        else:
            self.alpha, self.beta = high - low, low
        self.steps += 1


@dataclass(frozen=True)
class Compressed:
    """A tensor as codes of a few bits each, packed into bytes, with the range they were made under."""

    codes: Tensor
    alpha: Tensor
    beta: Tensor
    bits: int
    shape: torch.Size
    layout: Layout

    @property
    def num_bytes(self) -> int:
        return self.codes.numel() + 4 * (self.alpha.numel() + self.beta.numel())

    def values(self) -> Tensor:
        """Return the tensor, to within a step of its range where it was inside it."""
        rows = self.layout.rows(unpacked(self.codes, self.bits, math.prod(self.shape)).float())
        step = self.alpha / (2**self.bits - 1)
        return torch.addcmul(self.layout.by_column(self.beta), rows, self.layout.by_column(step)).view(self.shape)


@dataclass(frozen=True)
class Signs:
    """Where a tensor is positive, a bit each: all that a ReLU's backward pass asks."""

    codes: Tensor
    shape: torch.Size

    @property
    def num_bytes(self) -> int:
        return self.codes.numel()

    def values(self) -> Tensor:
        return unpacked(self.codes, 1, math.prod(self.shape)).view(self.shape).float()


def signs(x: Tensor) -> Signs:
    return Signs(packed((x > 0).to(torch.uint8).flatten(), 1), x.shape)


def compress(x: Tensor, bits: int, span: Range, layout: Layout, stochastic: bool) -> Compressed:
    """Return a tensor in codes of ``bits`` bits: round((x - beta) (2^bits - 1) / alpha), clipped at both ends.

    Stochastic rounding goes up or down with probabilities that make the mean exact, to 2^-17 of a step.
    """
    levels = 2**bits - 1
    scale = levels / span.alpha.clamp(min=SMALLEST)
    scaled = (layout.rows(x) - layout.by_column(span.beta)).mul_(layout.by_column(scale))
    if stochastic:
        scaled += noise(scaled)  # floored by the cast, as nothing is negative then
    else:
        scaled.round_()
    codes = scaled.clamp_(0, levels).to(torch.uint8).view(-1)
    return Compressed(packed(codes, bits), span.alpha, span.beta, bits, x.shape, layout)


def noise(like: Tensor) -> Tensor:
    """Return uniform numbers in (0, 1), odd multiples of 2^-17.

    A draw of 64 bits gives four of them, in two thirds of the time that ``rand`` takes.
    """
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    pieces: Tensor = draws.view(torch.int16)[: like.numel()].view_as(like)
    return pieces.to(like.dtype).add_(2**15 + 0.5).mul_(2**-16)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Return codes ``(n,)`` below 2**bits as bytes, 8 / bits of them each; uint8 one-dimensional."""
    share = 8 // bits
    if share == 1:
        return codes
    planes = torch.cat([codes, codes.new_zeros(-len(codes) % share)]).view(share, -1)
    result = planes[0].clone()
    for place in range(1, share):
        result |= planes[place] << (bits * place)
    return result


def unpacked(codes: Tensor, bits: int, count: int) -> Tensor:
    """Undo ``packed``: ``count`` codes, uint8."""
    if bits == 8:
        return codes
    places = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    planes: Tensor = (codes >> places[:, None]) & (2**bits - 1)
    return planes.view(-1)[:count]
