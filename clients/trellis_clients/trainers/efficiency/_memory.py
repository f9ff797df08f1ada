"""What a forward pass keeps for its backward pass: counted as it is saved, or measured as what stays alive."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages:
    """Pieces of memory, each once, without holding them: a view and what it views are one piece."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        # A weak reference keeps the key from being given out again.
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> int:
        """Return the bytes that are new with a tensor: 0 if its storage is known."""
        storage = tensor.untyped_storage()
        if key(storage) in self.found:
            return 0
        self.found[key(storage)] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        return storage.nbytes()

    def __contains__(self, tensor: Tensor) -> bool:
        return key(tensor.untyped_storage()) in self.found

    @property
    def alive(self) -> int:
        """Bytes of those that something still holds."""
        return sum(size for storage, size in self.found.values() if not storage.expired())  # type: ignore[no-untyped-call,misc]


def key(storage: UntypedStorage) -> int:
    found: int = storage._cdata
    return found


class Count:
    """Bytes that a forward pass saves for the backward pass, each piece of memory once, as autograd is given them.

    Attributes:
        exact: what autograd would keep without compression.
        kept: what is kept.
        apart: memory that is there anyway and is not counted: parameters, buffers, the batch.
    """

    def __init__(self, apart: Storages) -> None:
        self.apart, self.exact, self.kept = apart, 0, 0
        self._seen, self._staying = Storages(), Storages()

    def note(self, tensor: Tensor, stays: bool) -> None:
        """Take in a tensor that is saved, as it is (``stays``) or in another form."""
        if tensor in self.apart:
            return
        self.exact += self._seen.add(tensor)
        if stays:
            self.kept += self._staying.add(tensor)


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every storage that an operation inside makes, autograd's own and those of hooks among them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before, self.made = Storages(), Storages()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            if tensor not in self.made:
                self.before.add(tensor)  # no operation inside has made it
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            if tensor not in self.before:
                self.made.add(tensor)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_alive(forward: Callable[[], Tensor]) -> int:
    """Return the bytes of memory that ``forward`` makes and that are still there while its result is held.

    The result's own are among them; parameters, inputs and whatever else was there before are not. This is memory that
    is really held, whoever holds it, on any device, as no tensor is kept alive by the measurement.
    """
    with _Made() as mode:
        out = forward()
    total: int = mode.made.alive
    del out
    return total
