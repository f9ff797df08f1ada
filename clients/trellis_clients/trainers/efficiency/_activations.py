"""Activations kept for the backward pass in few bits, by way of autograd's hooks on what layers save."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from trellis_clients.trainers.efficiency._codes import Compressed, Layout, Range, Signs, compress, signs
from trellis_clients.trainers.efficiency._memory import Count, Storages


class Forward(saved_tensors_hooks):
    """The context of one forward pass of a layer.

    Autograd keeps the hooks as long as what they packed. So nothing that they refer to may hold an activation when the
    pass is over.

    Attributes:
        shared: what was packed inside, by where it lay, with the tensor itself, so that no other comes to lie there.
    """

    def __init__(self, pack: Callable[[Tensor, Shared], Any], unpack: Callable[[Any], Tensor]) -> None:
        shared: Shared = {}
        super().__init__(lambda x: pack(x, shared), unpack)
        self.shared = shared

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self.shared.clear()


Shared = dict[tuple[int, int], tuple[Tensor, Compressed]]


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
        self.apart = [*parameters]
        self.count: Count | None = None

    def over(self, name: str, layer: nn.Module) -> Forward:
        """Return the context in which one forward pass of a layer keeps less."""
        slots, own = itertools.count(), Storages([*layer.parameters(), *layer.buffers()])
        heads: int | None = getattr(layer, "heads", None)

        def pack(x: Tensor, shared: Shared) -> Any:
            x = x.detach()
            if self.bits == 32 or not self.compresses(layer, x, own):
                return self.raw(x)
            if self.count:
                self.count.note(x, stays=False)
            if isinstance(layer, nn.ReLU):
                return self.counted(signs(x))
            place = (x.data_ptr(), x.numel())
            if x.is_contiguous() and place in shared:  # what softmax gave is what the next product takes
                return shared[place][1], x.shape
            groups = heads or math.gcd(self.groups, x.shape[1] if x.ndim == 4 else x.shape[-1])
            layout = Layout.of(x.shape, groups, heads)
            with torch.no_grad():
                span = self.span(name, next(slots))
                span.update(x, layout, self.decay)
                small = compress(x, self.bits, span, layout, self.stochastic)
            if x.is_contiguous():
                shared[place] = (x, small)
            return self.counted(small), x.shape

        return Forward(pack, unpack)

    def compresses(self, layer: nn.Module, x: Tensor, own: Storages) -> bool:
        """Whether a saved tensor is an activation: none of the layer's own, and no statistic of a normalisation."""
        if not x.is_floating_point() or x.ndim < 2 or x.shape[-1] == 1:
            return isinstance(layer, nn.ReLU)
        return x not in own

    def span(self, name: str, slot: int) -> Range:
        spans = self.ranges.setdefault(name, [])
        if slot == len(spans):
            spans.append(Range(torch.empty(0), torch.empty(0)))
        return spans[slot]

    def raw(self, x: Tensor) -> Tensor:
        """Return what autograd is to keep: the values without their graph, which would hold itself otherwise."""
        if self.count:
            self.count.note(x, stays=True)
        return x.detach()

    def counted(self, small: Any) -> Any:
        if self.count:
            self.count.kept += small.num_bytes
        return small

    @contextmanager
    def counting(self, batch: Iterable[Tensor]) -> Iterator[Count]:
        """Count what a forward pass inside keeps, covered by a layer or not."""
        count = self.count = Count(Storages([*self.apart, *batch]))
        try:
            with saved_tensors_hooks(self.raw, lambda kept: kept):
                yield count
        finally:
            self.count = None


def unpack(kept: Any) -> Tensor:
    """Return a saved tensor from what ``Compression`` packed."""
    if isinstance(kept, Tensor):
        return kept
    if isinstance(kept, Signs):
        return kept.values()
    small, shape = kept
    values: Tensor = small.values().view(shape)
    return values


def cover(model: nn.Module, kinds: tuple[type[nn.Module], ...], live: Callable[[], Compression | None]) -> None:
    """Let every layer of some kinds keep compressed activations while ``live`` returns a compression and it trains."""
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            _cover(name, module, live)


def _cover(name: str, layer: nn.Module, live: Callable[[], Compression | None]) -> None:
    entered: list[Forward | None] = []

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
