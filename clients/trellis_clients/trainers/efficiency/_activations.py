"""Activations kept for the backward pass in few bits: quantisers with running ranges, and a count of what is kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

DECAY = 0.9
SMALLEST = 1e-12

Pack = Callable[[Tensor], Any]


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

    def update(self, rows: Tensor, decay: float) -> None:
        """Take in values ``(G, n)``. The first ones are taken as they are, so that they are not clipped."""
        low, high = rows.aminmax(dim=1)
        if self.steps:
            self.alpha = decay * self.alpha + (1 - decay) * (high - low)
            self.beta = decay * self.beta + (1 - decay) * low
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
    heads: int | None
    groups: int

    @property
    def num_bytes(self) -> int:
        return self.codes.numel() + 4 * (self.alpha.numel() + self.beta.numel())

    def values(self) -> Tensor:
        """Return the tensor, to within a step of its range where it was inside it."""
        codes = unpacked(self.codes, self.bits, math.prod(self.shape)).view(self.groups, -1)
        rows = codes * (self.alpha / (2**self.bits - 1))[:, None] + self.beta[:, None]
        return from_rows(rows, self.shape, self.groups, self.heads)


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


def compress(x: Tensor, bits: int, span: Range, groups: int, heads: int | None, stochastic: bool) -> Compressed:
    """Return a tensor in codes of ``bits`` bits: round((x - beta) (2^bits - 1) / alpha), clipped at both ends."""
    rows, levels = to_rows(x, groups, heads), 2**bits - 1
    alpha = span.alpha.clamp(min=SMALLEST)
    scaled = (rows - span.beta[:, None]) * (levels / alpha)[:, None]
    # Up or down with probabilities that make the mean exact.
    codes = (scaled + torch.rand_like(scaled)).floor_() if stochastic else scaled.round_()
    return Compressed(
        packed(codes.clamp_(0, levels).to(torch.uint8), bits), span.alpha, span.beta, bits, x.shape, heads, groups
    )


def to_rows(x: Tensor, groups: int, heads: int | None) -> Tensor:
    """Return values as ``(groups, n)``.

    A group is a head of ``(B, H, r, c)`` or ``(B*H, r, c)``, some channels of a map ``(B, C, h, w)``, or a piece of the
    last axis of anything else.
    """
    if heads is not None:
        return x.reshape(-1, heads, math.prod(x.shape[-2:])).transpose(0, 1).reshape(heads, -1)
    if x.ndim == 4:
        return x.reshape(len(x), groups, -1).transpose(0, 1).reshape(groups, -1)
    return x.reshape(-1, groups, x.shape[-1] // groups).transpose(0, 1).reshape(groups, -1)


def from_rows(rows: Tensor, shape: torch.Size, groups: int, heads: int | None) -> Tensor:
    """Undo ``to_rows``."""
    if heads is not None:
        inner = math.prod(shape[-2:])
        return rows.view(heads, -1, inner).transpose(0, 1).reshape(shape)
    if len(shape) == 4:
        return rows.view(groups, shape[0], -1).transpose(0, 1).reshape(shape)
    return rows.view(groups, -1, shape[-1] // groups).transpose(0, 1).reshape(shape)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Return codes below 2**bits as bytes, 8 / bits of them each; uint8 one-dimensional."""
    flat, share = codes.flatten(), 8 // bits
    if share == 1:
        return flat
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % share)]).view(-1, share)
    result = flat[:, 0].clone()
    for place in range(1, share):
        result |= flat[:, place] << (bits * place)
    return result


def unpacked(codes: Tensor, bits: int, count: int) -> Tensor:
    """Undo ``packed``: ``count`` codes, uint8."""
    if bits == 8:
        return codes
    places = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    codes = ((codes[:, None] >> places) & (2**bits - 1)).flatten()
    return codes[:count]


@dataclass
class Count:
    """Bytes kept for the backward pass of one step, each piece of memory once.

    Attributes:
        exact: what autograd would keep without compression.
        kept: what is kept.
        apart: memory that is there anyway: parameters, buffers, the batch.
    """

    apart: set[int]
    exact: int = 0
    kept: int = 0
    seen: dict[int, Tensor] = field(default_factory=dict)  # tensors, so that no address is given out twice

    def note(self, tensor: Tensor, stays: bool) -> None:
        place = tensor.untyped_storage().data_ptr()
        if place in self.apart:
            return
        size = tensor.untyped_storage().nbytes()
        if place not in self.seen:
            self.seen[place] = tensor
            self.exact += size
        if stays and -place not in self.seen:
            self.seen[-place] = tensor
            self.kept += size


def places(tensors: Iterable[Tensor]) -> set[int]:
    """Return where tensors lie in memory."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


class Compression:
    """Compresses what covered layers keep for the backward pass, for one client's turn.

    Args:
        bits: 2, 4 or 8; 32 keeps everything as it is and only counts.
        ranges: of each layer's saved tensors, by its name and in the order in which they are saved.
        parameters: of the model; they are there anyway and are not counted.
    """

    def __init__(
        self,
        bits: int,
        groups: int,
        stochastic: bool,
        decay: float,
        ranges: dict[str, list[Range]],
        parameters: Iterable[Tensor],
    ) -> None:
        self.bits, self.groups, self.stochastic, self.decay = bits, groups, stochastic, decay
        self.ranges = ranges
        self.apart = places(parameters)
        self.count: Count | None = None

    def over(self, name: str, layer: nn.Module) -> saved_tensors_hooks:
        """Return the context in which one forward pass of a layer keeps less."""
        slots, own = itertools.count(), places([*layer.parameters(), *layer.buffers()])
        shared: dict[tuple[int, int], tuple[Tensor, Compressed]] = {}

        def pack(x: Tensor) -> Any:
            if self.bits == 32 or not self.compresses(layer, x, own):
                return self.raw(x)
            if self.count:
                self.count.note(x, stays=False)
            if isinstance(layer, nn.ReLU):
                signs = Signs(packed((x > 0).to(torch.uint8), 1), x.shape)
                return self.counted(signs)
            key = (x.data_ptr(), x.numel())
            if x.is_contiguous() and key in shared:  # what softmax gave is what the next product takes
                return shared[key][1], x.shape
            heads = getattr(layer, "heads", None)
            groups = heads or math.gcd(self.groups, x.shape[1] if x.ndim == 4 else x.shape[-1])
            with torch.no_grad():
                span = self.span(name, next(slots))
                span.update(to_rows(x.detach(), groups, heads), self.decay)
                small = compress(x.detach(), self.bits, span, groups, heads, self.stochastic)
            if x.is_contiguous():
                shared[key] = (x, small)
            return self.counted(small), x.shape

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            if isinstance(kept, Signs):
                return kept.values()
            small, shape = kept
            values: Tensor = small.values().reshape(shape)
            return values

        return saved_tensors_hooks(pack, unpack)

    def compresses(self, layer: nn.Module, x: Tensor, own: set[int]) -> bool:
        """Whether a saved tensor is an activation: none of the layer's own, and no statistic of a normalisation."""
        if not x.is_floating_point() or x.ndim < 2 or x.shape[-1] == 1:
            return isinstance(layer, nn.ReLU)
        return x.untyped_storage().data_ptr() not in own

    def span(self, name: str, slot: int) -> Range:
        spans = self.ranges.setdefault(name, [])
        if slot == len(spans):
            spans.append(Range(torch.empty(0), torch.empty(0)))
        return spans[slot]

    def raw(self, x: Tensor) -> Tensor:
        if self.count:
            self.count.note(x, stays=True)
        return x

    def counted(self, small: Any) -> Any:
        if self.count:
            self.count.kept += small.num_bytes
        return small

    @contextmanager
    def counting(self, batch: Iterable[Tensor]) -> Iterator[Count]:
        """Count what a forward pass inside keeps, covered by a layer or not."""
        count = self.count = Count(self.apart | places(batch))
        try:
            with saved_tensors_hooks(self.raw, lambda kept: kept):
                yield count
        finally:
            self.count = None
            count.seen = {}


def cover(model: nn.Module, kinds: tuple[type[nn.Module], ...], live: Callable[[], Compression | None]) -> None:
    """Let every layer of some kinds keep compressed activations while ``live`` returns a compression and it trains."""
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            _cover(name, module, live)


def _cover(name: str, layer: nn.Module, live: Callable[[], Compression | None]) -> None:
    entered: list[saved_tensors_hooks | None] = []

    def before(module: nn.Module, args: Any) -> None:  # noqa: ARG001
        compression = live() if module.training and torch.is_grad_enabled() else None
        context = compression.over(name, module) if compression else None
        if context is not None:
            context.__enter__()
        entered.append(context)

    def after(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
        context = entered.pop()
        if context is not None:
            context.__exit__()

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after, always_call=True)
