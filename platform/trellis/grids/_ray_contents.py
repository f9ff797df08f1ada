"""What ``RayGrid`` sends to its workers: contents of messages, each in the way that suits its size.

- A small one travels within the call.
- A larger one is put into Ray's object store, once for all messages that share it.
- Of a large one every record of arrays is put there by itself, and stays there as long as it lives here: what is sent
  for training is sent again for evaluation. It is also read there from then on by this process, so that a global
  model lies in memory once.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

from flwr.app import Array, ArrayRecord, RecordDict

from trellis import memory, records
from trellis.records import LiveArray

SMALL = 2**16
"""Bytes up to which content travels within the call."""

_keys = itertools.count(1)


@dataclass(frozen=True)
class Parcel:
    """A content as arguments of a call to a worker.

    Attributes:
        key: names the content; unique in this process.
        names: of its records, in order.
        body: the content itself, or its reference; without the records that are sent beside it.
        beside: names and references of those.
        large: whether there are any.
    """

    key: int
    names: tuple[str, ...]
    body: Any
    beside: tuple[tuple[str, Any], ...] = ()

    @property
    def large(self) -> bool:
        return bool(self.beside)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Arguments for ``unpacked``. References stand by themselves, or Ray would not look at them."""
        return (self.names, self.body, tuple(name for name, _ in self.beside), *(ref for _, ref in self.beside))


def unpacked(names: tuple[str, ...], body: RecordDict, beside: tuple[str, ...], *found: ArrayRecord) -> RecordDict:
    """Return the content that a parcel stands for."""
    if not beside:
        return body
    apart = dict(zip(beside, found, strict=True))
    return RecordDict({name: apart[name] if name in apart else body[name] for name in names})


class Contents:
    """The records of arrays that lie in the object store, each as long as somebody has it here."""

    def __init__(self) -> None:
        self._stored: dict[int, tuple[Any, tuple[Array, ...]]] = {}
        self._moved: dict[int, weakref.ref[LiveArray]] = {}

    def packed(self, content: RecordDict) -> Parcel:
        """Return a content as arguments of a call."""
        import ray

        key, names = next(_keys), tuple(content)
        sizes = {name: sum(map(records.num_bytes, r.values())) for name, r in records.array_records(content).items()}
        large = {name for name, size in sizes.items() if size >= memory.LARGE}
        if not large:
            small = records.content_bytes(content) <= SMALL
            return Parcel(key, names, content if small else ray.put(content))
        body = RecordDict({name: record for name, record in content.items() if name not in large})
        found = records.array_records(content)
        return Parcel(key, names, body, tuple((name, self._put(found[name])) for name in names if name in large))

    def close(self) -> None:
        """Fetch what is still in use out of the object store."""
        for array in [reference() for reference in self._moved.values()]:
            if array is not None:
                array.move(array.numpy())
        self._moved.clear()
        self._stored.clear()

    def _put(self, record: ArrayRecord) -> Any:
        import ray

        arrays = tuple(record.values())
        reference, stored = self._stored.get(id(record), (None, ()))
        if len(stored) != len(arrays) or any(a is not b for a, b in zip(arrays, stored, strict=True)):
            if reference is None:
                weakref.finalize(record, self._stored.pop, id(record), None)
            reference = ray.put(record)
            self._stored[id(record)] = reference, arrays
            for array, there in zip(arrays, ray.get(reference).values(), strict=True):
                if type(array) is LiveArray and type(there) is LiveArray:
                    array.move(there.view())
                    self._moved[id(array)] = weakref.ref(array, partial(_drop, self._moved, id(array)))
        return reference


def _drop(moved: dict[int, weakref.ref[LiveArray]], key: int, gone: weakref.ref[LiveArray]) -> None:
    if moved.get(key) is gone:
        del moved[key]
