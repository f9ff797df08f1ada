"""Keeping a process small around large models: arrays on disk, and freed memory given back.

What a round must hold on to but does not work on (replies that wait to be judged, running sums) is spilled: it lies
in a file that has no name and is gone with its last user, however the process ends, and passes through memory in
pieces. The kernel's page cache may hold it as long as memory is free, and never longer.

Models below ``LARGE`` are not worth the trouble, and nothing here touches them.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message
from numpy.typing import NDArray

from trellis import records
from trellis.records import NPY_STYPE, LiveArray

Key = tuple[str, str]

LARGE = 4 * 2**20
"""Bytes from which arrays go to disk rather than wait in memory."""

PIECE = 1 << 18
"""Values that pass through memory at a time; a multiple of every block that is calculated in."""


class Spill:
    """A file without a name, in a folder or else the system's place for temporary files."""

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed with its last user)
        self._end = 0

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Spilled:
        """Return an array of zeros, which take no room on the disk before they are written to."""
        offset, self._end = self._end, self._end + math.prod(shape) * dtype.itemsize
        os.ftruncate(self._file.fileno(), self._end)
        return Spilled(self, offset, shape, dtype)

    def keep(self, values: NDArray[Any]) -> Spilled:
        """Return an array on disk with these values."""
        spilled = self.zeros(values.shape, values.dtype)
        flat = values.reshape(-1)
        for start in range(0, flat.size, PIECE):
            spilled.write(start, flat[start : start + PIECE])
        return spilled

    def read_into(self, values: NDArray[Any], offset: int) -> None:
        view = memoryview(values.view(np.uint8).data)
        while view.nbytes:
            count = os.preadv(self._file.fileno(), [view], offset)
            if not count:
                raise OSError(f"a spilled array ends {view.nbytes} bytes early")
            view, offset = view[count:], offset + count

    def write_from(self, values: NDArray[Any], offset: int) -> None:
        view = memoryview(np.ascontiguousarray(values).view(np.uint8).data)
        while view.nbytes:
            count = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count


class Spilled:
    """An array on disk."""

    def __init__(self, spill: Spill, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._spill, self._offset = spill, offset
        self.shape, self.dtype = shape, dtype
        self.size = math.prod(shape)

    def read(self) -> NDArray[Any]:
        """Return the whole array, in memory of its own."""
        values = np.empty(self.size, self.dtype)
        if self.size:
            self._spill.read_into(values, self._offset)
        return values.reshape(self.shape)

    def write(self, start: int, values: NDArray[Any]) -> None:
        """Write values of one dimension, from a position on."""
        if values.size:
            self._spill.write_from(values, self._offset + start * self.dtype.itemsize)

    def pieces(self, *, write: bool = False) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield position and values of one piece after another, and write back what became of them if asked."""
        room = np.empty(min(self.size, PIECE), self.dtype)
        for start in range(0, self.size, PIECE):
            part = room[: min(PIECE, self.size - start)]
            self._spill.read_into(part, self._offset + start * self.dtype.itemsize)
            yield start, part
            if write:
                self.write(start, part)


class SpilledArray(LiveArray):
    """A Flower ``Array`` whose values are on disk; each look at them reads them anew."""

    def __init__(self, spilled: Spilled) -> None:
        self.__dict__.update(_spilled=spilled, dtype=str(spilled.dtype), shape=tuple(spilled.shape), stype=NPY_STYPE)

    def view(self) -> NDArray[Any]:
        values = self.spilled.read()
        values.flags.writeable = False
        return values

    def numpy(self) -> NDArray[Any]:
        return self.spilled.read()

    @property
    def spilled(self) -> Spilled:
        """The array on disk."""
        spilled: Spilled = self.__dict__["_spilled"]
        return spilled

    @property
    def value_dtype(self) -> np.dtype[Any]:
        return self.spilled.dtype

    @property
    def nbytes(self) -> int:
        return self.spilled.size * self.spilled.dtype.itemsize


class Lazily(Mapping[Key, NDArray[Any]]):
    """Arrays by name, some of which are made at each look and held by nobody here."""

    def __init__(self, found: Mapping[Key, NDArray[Any]], waiting: Mapping[Key, Callable[[], NDArray[Any]]]) -> None:
        self._found, self._waiting = found, waiting

    def __getitem__(self, key: Key) -> NDArray[Any]:
        return self._waiting[key]() if key in self._waiting else self._found[key]

    def __iter__(self) -> Iterator[Key]:
        yield from self._found
        yield from self._waiting

    def __len__(self) -> int:
        return len(self._found) + len(self._waiting)


def spill(message: Message, folder: Path | None) -> bool:
    """Put a reply's arrays on disk if they are large. Returns whether its arrays are there now.

    The message stays the same object. Its records of arrays are replaced, not changed: others may hold them.
    """
    if not message.has_content():
        return False
    found = records.array_records(message.content)
    if any(isinstance(array, SpilledArray) for record in found.values() for array in record.values()):
        return True
    live = all(isinstance(array, LiveArray) for record in found.values() for array in record.values())
    if not live or sum(records.num_bytes(array) for record in found.values() for array in record.values()) < LARGE:
        return False
    file = Spill(folder)
    for name, record in found.items():
        replaced = ArrayRecord()
        for key, array in record.items():
            replaced[key] = SpilledArray(file.keep(records.view(array)))
        message.content[name] = replaced
    return True


def trim() -> None:
    """Give freed memory back to the system, where the C library knows how.

    After it has freed a block of a few megabytes, glibc cuts later ones of such a size from its heap and keeps what
    is freed inside the heap: with the tensors of a large model, up to another model.
    """
    if release := _malloc_trim():
        release(0)


@cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
