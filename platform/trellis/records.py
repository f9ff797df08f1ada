"""Flower records without needless serialisation, and their one file format.

Flower's ``Array`` keeps its data as the bytes of a ``.npy`` file. In simulation nobody reads those bytes,
so ``LiveArray`` holds the NumPy array itself and makes the bytes only if Flower asks for them. Pickled
into Ray's object store it is read back without a copy.

On disk and on a wire, records are one safetensors blob: tensors by ``record/name``, everything else as
JSON in the header. No pickle is ever read.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from trellis.errors import DataError

T = TypeVar("T")

ARRAYS = "arrays"
METRICS = "metrics"
CONFIG = "config"
TIMING = "trellis.timing"
"""ConfigRecord of a reply with the client's own ``seconds`` and ``cpu_seconds``; strategies never see it."""

PARTIAL = "partial"
"""Key of a message's config: the reply shall leave out what the trainer calls frozen, and the client keep it."""

NPY_STYPE = "numpy.ndarray"
FORMAT = "trellis-records-1"


class LiveArray(Array):
    """A Flower ``Array`` that holds its NumPy array, not a serialised copy of it.

    The array must not change afterwards; it is marked read-only. ``numpy()`` returns a fresh, writable
    copy, as Flower's own does.
    """

    def __init__(self, ndarray: NDArray[Any]) -> None:
        view = ndarray.view()
        view.flags.writeable = False
        self.__dict__.update(_live=view, dtype=name_of(view.dtype), shape=view.shape, stype=NPY_STYPE)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The ``.npy`` bytes, made on demand."""
        buffer = io.BytesIO()
        np.save(buffer, self.view(), allow_pickle=False)
        return buffer.getvalue()

    def view(self) -> NDArray[Any]:
        """Return the array itself, read-only."""
        live: NDArray[Any] = self.__dict__["_live"]
        return live

    def move(self, ndarray: NDArray[Any]) -> None:
        """Hold the same values in another place."""
        view = ndarray.view()
        view.flags.writeable = False
        self.__dict__["_live"] = view
        self.__dict__.pop("_seen", None)

    def seen_as(self, make: Callable[[NDArray[Any]], T]) -> T:
        """Return what a function makes of the array, made once; for another object that shares its memory."""
        if (seen := self.__dict__.get("_seen")) is None or seen[0] is not make:
            seen = self.__dict__["_seen"] = make, make(self.view())
        made: T = seen[1]
        return made

    def numpy(self) -> NDArray[Any]:
        return self.view().copy()

    @property
    def value_dtype(self) -> np.dtype[Any]:
        """The values' own dtype; ``dtype`` is its name."""
        return self.view().dtype

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return self.view().nbytes

    def deflate(self) -> bytes:
        """Return Flower's own wire format, in which the class is named: the other end knows ``Array``."""
        return b"Array" + super().deflate().removeprefix(b"LiveArray")

    def __reduce__(self) -> tuple[type[LiveArray], tuple[NDArray[Any]]]:
        return LiveArray, (self.view(),)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return self.dtype == other.dtype and self.shape == other.shape and self.data == other.data

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"LiveArray(dtype={self.dtype}, shape={self.shape})"


@cache
def name_of(dtype: np.dtype[Any]) -> str:
    """Return a dtype's name, which NumPy puts together anew each time."""
    return str(dtype)


def view(array: Array) -> NDArray[Any]:
    """Return an array's values, without a copy where it is live."""
    return array.view() if isinstance(array, LiveArray) else array.numpy()


def num_bytes(array: Array) -> int:
    """Return the size of an array's values in bytes, without serialising it."""
    return array.nbytes if isinstance(array, LiveArray) else len(array.data)


def dtype_of(array: Array) -> np.dtype[Any]:
    """Return the dtype of an array's values."""
    return array.value_dtype if isinstance(array, LiveArray) else array.numpy().dtype


def array_record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Return an ``ArrayRecord`` of live arrays. The arrays are shared, not copied."""
    record = ArrayRecord()
    for name, values in arrays.items():
        record[name] = LiveArray(values if type(values) is np.ndarray else np.asarray(values))
    return record


def live(record: ArrayRecord, like: ArrayRecord | None = None) -> ArrayRecord:
    """Return a record of live arrays, with the dtypes of ``like`` (integers rounded) where it is given.

    Flower's weighted average turns integer buffers into floats; without the cast back, batch-norm counters
    would change dtype after the first round.
    """
    result: dict[str, NDArray[Any]] = {}
    for name, array in record.items():
        values = view(array)
        if like is not None and name in like and str(values.dtype) != like[name].dtype:
            dtype = np.dtype(like[name].dtype)
            values = np.rint(values).astype(dtype) if dtype.kind in "iu" else values.astype(dtype)
        result[name] = values
    return array_record(result)


def content_bytes(content: RecordDict) -> int:
    """Return the payload of a message in bytes: array values, and 8 for every number beside them."""
    total = 0
    for record in content.values():
        for value in record.values():
            if isinstance(value, Array):
                total += num_bytes(value)
            elif isinstance(value, str | bytes):
                total += len(value)
            elif isinstance(value, list):
                total += 8 * len(value)
            else:
                total += 8
    return total


def digest(record: ArrayRecord) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values, independent of the order of names."""
    sha = hashlib.sha256()
    for name in sorted(record):
        values = np.ascontiguousarray(view(record[name]))
        sha.update(f"{name}\0{values.dtype.str}\0{values.shape}\0".encode())
        sha.update(values.tobytes())
    return sha.hexdigest()


def to_bytes(content: RecordDict) -> bytes:
    """Serialise records as one safetensors blob, with everything that is not an array in its header."""
    from safetensors.numpy import save

    tensors: dict[str, NDArray[Any]] = {}
    rest: dict[str, dict[str, Any]] = {}
    for number, (record_name, record) in enumerate(content.items()):
        kind = next(k for k, v in _KINDS.items() if isinstance(record, v))
        if isinstance(record, ArrayRecord):
            rest[record_name] = {"kind": kind, "names": list(record)}
            # safetensors sorts by name; numbered keys keep names free of any character rule.
            for position, array in enumerate(record.values()):
                tensors[f"{number}/{position}"] = np.ascontiguousarray(view(array)).reshape(array.shape)
        else:
            rest[record_name] = {"kind": kind, "values": {k: _plain(v) for k, v in record.items()}}
    blob: bytes = save(tensors, metadata={"format": FORMAT, "records": json.dumps(rest)})
    return blob


def from_bytes(blob: bytes) -> RecordDict:
    """Read what ``to_bytes`` wrote.

    Raises:
        DataError: the blob is not such a file, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        (length,) = struct.unpack("<Q", blob[:8])
        header = json.loads(blob[8 : 8 + length])
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise DataError("records-format", f"records of format {metadata['format']!r}; expected {FORMAT!r}")
        rest = json.loads(metadata["records"])
        tensors = load(blob)
        content = RecordDict()
        for number, (record_name, entry) in enumerate(rest.items()):
            if entry["kind"] == ARRAYS:
                arrays = {name: tensors[f"{number}/{i}"] for i, name in enumerate(entry["names"])}
                content[record_name] = array_record(arrays)
            else:
                values = {k: _unplain(v) for k, v in entry["values"].items()}
                content[record_name] = MetricRecord(values) if entry["kind"] == METRICS else ConfigRecord(values)
    except (
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        struct.error,
        SafetensorError,
        UnicodeDecodeError,
    ) as error:
        raise DataError("records-damaged", f"not readable as records: {type(error).__name__}: {error}") from None
    return content


_KINDS: dict[str, type] = {ARRAYS: ArrayRecord, METRICS: MetricRecord, CONFIG: ConfigRecord}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, float):
        return {"float": value.hex()}  # exact, and NaN survives
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def _unplain(value: Any) -> Any:
    if isinstance(value, dict):
        if "bytes" in value:
            return base64.b64decode(value["bytes"])
        return float.fromhex(value["float"])
    if isinstance(value, list):
        return [_unplain(v) for v in value]
    return value


# ``content.array_records`` and its two sisters tie the content into a reference cycle, which only the garbage
# collector undoes; until it comes by, whole models would pile up. These three do not.


def array_records(content: RecordDict) -> dict[str, ArrayRecord]:
    """Return the ArrayRecords of a message by name."""
    return {name: record for name, record in content.items() if isinstance(record, ArrayRecord)}


def metric_records(content: RecordDict) -> dict[str, MetricRecord]:
    """Return the MetricRecords of a message by name."""
    return {name: record for name, record in content.items() if isinstance(record, MetricRecord)}


def config_record(content: RecordDict, name: str) -> ConfigRecord:
    """Return a ConfigRecord of a message; an empty one where there is none of that name."""
    record = content.get(name)
    return record if isinstance(record, ConfigRecord) else ConfigRecord()


def arrays_of(content: RecordDict) -> Iterator[tuple[str, str, Array]]:
    """Yield ``(record name, array name, array)`` for every array of a message."""
    for record_name, record in content.items():
        if isinstance(record, ArrayRecord):
            for name, array in record.items():
                yield record_name, name, array
