"""Records as bytes: one safetensors file, with everything that is not an array as JSON in its header.

The format of run folders (``trellis.records``), here without Flower: a record is ``(kind, values)``. Reading makes
views into the buffer and copies nothing, so that a large answer can stay in a file that is mapped into memory.
The reader trusts no byte: names, types, shapes and offsets are checked before any array is made.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trellis.errors import DataError

FORMAT = "trellis-records-1"
MAX_HEADER = 16_000_000
MAX_ARRAYS = 100_000
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
_CODES = {np.dtype(name): code for code, name in DTYPES.items()}

Kind = Literal["arrays", "metrics", "config"]
Scalar = int | float | str | bytes | bool
Value = Scalar | Sequence[Any]


@dataclass(frozen=True)
class Record:
    """One record of a message.

    Attributes:
        kind: ``arrays`` holds arrays by name; ``metrics`` numbers and lists of them; ``config`` also text and bytes.
        values: by name, in order.
        notes: what an encoder wants to tell the decoder, e.g. how arrays were shortened.
    """

    kind: Kind
    values: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)


Content = dict[str, Record]


def pack(content: Mapping[str, Record]) -> bytes:
    """Return the records as bytes.

    Raises:
        DataError: an array's type or a value's type has no place in the format.
    """
    header: dict[str, Any] = {}
    parts: list[NDArray[Any]] = []
    rest: dict[str, dict[str, Any]] = {}
    offset = 0
    for number, (record_name, record) in enumerate(content.items()):
        entry: dict[str, Any] = {"kind": record.kind}
        if record.notes:
            entry["notes"] = {key: _plain(value) for key, value in record.notes.items()}
        if record.kind == "arrays":
            entry["names"] = list(record.values)
            for position, (name, values) in enumerate(record.values.items()):
                array = np.asarray(values)
                if array.dtype not in _CODES:
                    raise DataError("records-dtype", f"{record_name}/{name}: arrays of {array.dtype} do not travel")
                part = np.ascontiguousarray(array).reshape(-1)
                end = offset + part.nbytes
                header[f"{number}/{position}"] = {
                    "dtype": _CODES[array.dtype],
                    "shape": list(array.shape),
                    "data_offsets": [offset, end],
                }
                parts.append(part)
                offset = end
        else:
            entry["values"] = {key: _plain(value) for key, value in record.values.items()}
        rest[record_name] = entry
    metadata = {"format": FORMAT, "records": json.dumps(rest)}
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that every array starts aligned in a file that is mapped
    return b"".join([struct.pack("<Q", len(text)), text, *(part.view(np.uint8).data for part in parts)])


def unpack(buffer: bytes | memoryview) -> Content:
    """Return the records that ``pack`` wrote. Arrays are read-only views into the buffer.

    Raises:
        DataError: these are not such bytes, or they are damaged.
    """
    try:
        return _unpack(memoryview(buffer).cast("B").toreadonly())
    except DataError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, struct.error, RecursionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError("records-damaged", f"not readable as records: {reason:.200}") from None


def _unpack(view: memoryview) -> Content:
    (length,) = struct.unpack_from("<Q", view)
    if length > min(MAX_HEADER, len(view) - 8):
        raise DataError("records-damaged", f"the header claims {length} bytes of {len(view)}")
    header = json.loads(bytes(view[8 : 8 + length]))
    metadata = header.pop("__metadata__")
    if metadata["format"] != FORMAT:
        raise DataError("records-format", f"records of format {metadata['format']!r:.40}; expected {FORMAT!r}")
    if len(header) > MAX_ARRAYS:
        raise DataError("records-damaged", f"{len(header)} arrays; at most {MAX_ARRAYS} are read")
    arrays = _arrays(header, view[8 + length :])
    content: Content = {}
    taken = 0
    for number, (name, entry) in enumerate(json.loads(metadata["records"]).items()):
        kind, values = entry["kind"], entry.get("values", {})
        notes = {key: _unplain(value) for key, value in entry.get("notes", {}).items()}
        if kind == "arrays":
            held = {key: arrays[f"{number}/{place}"] for place, key in enumerate(entry["names"])}
            if len(held) != len(entry["names"]) or not all(isinstance(key, str) for key in held):
                raise DataError("records-damaged", f"record {name!r:.60} names an array twice, or not by text")
            taken += len(held)
            content[name] = Record(kind, held, notes)
        elif kind in ("metrics", "config"):
            content[name] = Record(kind, {key: _unplain(value) for key, value in values.items()}, notes)
        else:
            raise DataError("records-damaged", f"record {name!r:.60} is of kind {kind!r:.40}")
    if taken != len(arrays):
        raise DataError("records-damaged", f"{len(arrays)} arrays for {taken} names")
    return content


def _arrays(header: Mapping[str, Any], data: memoryview) -> dict[str, NDArray[Any]]:
    """Return the arrays; together they must cover the data without a gap or an overlap."""
    arrays: dict[str, NDArray[Any]] = {}
    covered = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = np.dtype(DTYPES[entry["dtype"]]), entry["shape"]
        if len(shape) > 32 or not all(type(side) is int and 0 <= side < 2**40 for side in shape):
            raise DataError("records-damaged", f"array {name!r:.60} has the shape {shape!r:.80}")
        start, end = entry["data_offsets"]
        if type(start) is not int or type(end) is not int or start != covered or not start <= end <= len(data):
            raise DataError("records-damaged", f"array {name!r:.60} lies at {start!r:.30} to {end!r:.30}")
        if math.prod(shape) * dtype.itemsize != end - start:
            raise DataError("records-damaged", f"array {name!r:.60} of shape {shape} takes {end - start} bytes")
        if entry["dtype"] == "BOOL" and end > start and np.frombuffer(data[start:end], np.uint8).max() > 1:
            raise DataError("records-damaged", f"array {name!r:.60} holds truth values other than 0 and 1")
        arrays[name] = np.frombuffer(data[start:end], dtype).reshape(shape)
        covered = end
    if covered != len(data):
        raise DataError("records-damaged", f"{len(data) - covered} bytes belong to no array")
    return arrays


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, float):
        return {"float": float(value).hex()}  # exact, and NaN survives
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    raise DataError("records-type", f"values of type {type(value).__name__} do not travel")


def _unplain(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"bytes"}:
            return base64.b64decode(value["bytes"], validate=True)
        if set(value) == {"float"}:
            return float.fromhex(value["float"])
        raise DataError("records-damaged", f"a value with the keys {sorted(value)!r:.60}")
    if isinstance(value, list):
        return [_unplain(each) for each in value]
    if isinstance(value, float):
        raise DataError("records-damaged", "a number that is not written in hexadecimal")
    return value
