"""Requests of the Open Inference Protocol into NumPy batches, and answers back.

What comes over the wire is anybody's: everything is checked before an array of its claimed size is made, and
whatever is wrong ends in a ``RequestError`` with a gRPC status and one line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from grpc import StatusCode
from numpy.typing import NDArray

from trellis_clients.edge.generated import open_inference_pb2 as oip
from trellis_clients.edge.preprocessing import Preprocessing

MOST_FIELDS = 64
"""Top-level fields of a request. A parsed empty message takes fifty times its two bytes on the wire: a request of
some megabytes made of them would fill a small device's memory, so they are counted before anything is parsed."""

LARGEST = 1e6
"""Largest magnitude of an input. Preprocessed pixels stand below ten; what is far beyond overflows inside a model."""

FLOATS = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
INTEGERS = {
    "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
}  # fmt: skip
TYPED = {
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "UINT64": "uint64_contents",
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
}
"""Field of the typed contents of a datatype; FP16 has none and goes raw."""


class RequestError(Exception):
    """A request that cannot be answered: a gRPC status and one line for whoever sent it."""

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = " ".join(message.split())


def invalid(message: str) -> RequestError:
    """Return the error of a request that is wrong whatever the server's state."""
    return RequestError(StatusCode.INVALID_ARGUMENT, message)


def shown(text: str) -> str:
    """Return text from a request, quoted and cut: a status must fit into a header."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


@dataclass(frozen=True)
class Expected:
    """What a served model takes.

    Attributes:
        name: of its one input.
        shape: of one example.
        preprocessing: of pixels, which come as integers; None where the model does not take images.
        most: largest batch.
    """

    name: str
    shape: tuple[int, ...]
    preprocessing: Preprocessing | None
    most: int

    @property
    def bytes_of_a_batch(self) -> int:
        """Bytes of the largest batch in the widest datatype."""
        return self.most * math.prod(self.shape) * 8


def parse(data: bytes) -> oip.ModelInferRequest:
    """Return the message that ``data`` encodes.

    Raises:
        RequestError: the bytes are no such message, or have more than ``MOST_FIELDS`` top-level fields.
    """
    _check_fields(data)
    try:
        message: oip.ModelInferRequest = oip.ModelInferRequest.FromString(data)
    except DecodeError:
        raise invalid("the request is not a ModelInferRequest: its bytes do not parse") from None
    return message


def decode(request: oip.ModelInferRequest, expected: Expected) -> NDArray[np.float32]:
    """Return the request's batch as the model takes it, ``(n, *shape)``, finite.

    Floating-point inputs go to the model as they are. Integers are pixels from 0 to 255 and are preprocessed here.

    Raises:
        RequestError: INVALID_ARGUMENT, or RESOURCE_EXHAUSTED for a batch over the limit.
    """
    if len(request.inputs) != 1:
        raise invalid(f"the model takes one input, {expected.name!r}; the request has {len(request.inputs)}")
    tensor = request.inputs[0]
    if tensor.name != expected.name:
        raise invalid(f"no input is named {shown(tensor.name)}; the model takes {expected.name!r}")
    allowed = [*FLOATS, *(INTEGERS if expected.preprocessing else ())]
    if tensor.datatype not in allowed:
        raise invalid(f"input {expected.name!r}: datatype {shown(tensor.datatype)}; allowed: {', '.join(allowed)}")
    _check_shape(tensor.shape, expected)
    values = _contents(request, tensor, math.prod(tensor.shape)).reshape(tuple(tensor.shape))
    if tensor.datatype in INTEGERS:
        assert expected.preprocessing is not None
        if values.dtype != np.uint8 and (values.min() < 0 or values.max() > 255):
            raise invalid(f"input {expected.name!r}: integers are pixels and lie in 0..255")
        return expected.preprocessing.to_inputs(values.astype(np.float32) / np.float32(255))
    with np.errstate(over="ignore"):
        batch = values.astype(np.float32, copy=False)
    if not (np.abs(batch) <= LARGEST).all():  # written so that NaN fails
        raise invalid(f"input {expected.name!r}: a value is NaN, infinite or beyond ±{LARGEST:.0e}")
    return batch


def _check_shape(shape: Sequence[int], expected: Expected) -> None:
    wanted = f"[n, {', '.join(map(str, expected.shape))}]"
    if len(shape) > 16 or tuple(shape[1:]) != expected.shape or not shape or shape[0] < 0:
        raise invalid(f"input {expected.name!r}: shape {list(shape[:8])}; the model takes {wanted}")
    if shape[0] == 0:
        raise invalid(f"input {expected.name!r}: the batch is empty; the model takes {wanted} with n at least 1")
    if shape[0] > expected.most:
        raise RequestError(
            StatusCode.RESOURCE_EXHAUSTED,
            f"input {expected.name!r}: a batch of {shape[0]}; this server takes up to {expected.most}",
        )


def _contents(request: oip.ModelInferRequest, tensor: Any, count: int) -> NDArray[Any]:
    """Return the tensor's elements, flat, from wherever the request has them."""
    dtype = np.dtype((FLOATS | INTEGERS)[tensor.datatype])
    if request.raw_input_contents:
        if tensor.HasField("contents"):
            raise invalid("the request has both raw_input_contents and typed contents; use one of them")
        if len(request.raw_input_contents) != 1:
            raise invalid(f"raw_input_contents has {len(request.raw_input_contents)} entries for one input")
        raw = request.raw_input_contents[0]
        if len(raw) != count * dtype.itemsize:
            raise invalid(
                f"input {shown(tensor.name)}: {len(raw)} bytes of raw contents; "
                f"{tensor.datatype} of shape {list(tensor.shape)} takes {count * dtype.itemsize}"
            )
        return np.frombuffer(raw, dtype)
    field = TYPED.get(tensor.datatype)
    if field is None:
        raise invalid(f"input {shown(tensor.name)}: {tensor.datatype} has no typed contents; use raw_input_contents")
    others = [each.name for each, _ in tensor.contents.ListFields() if each.name != field]
    if others:
        raise invalid(f"input {shown(tensor.name)}: {tensor.datatype} goes into {field}, not into {others[0]}")
    values = getattr(tensor.contents, field)
    if len(values) != count:
        raise invalid(
            f"input {shown(tensor.name)}: {len(values)} elements in {field}; shape {list(tensor.shape)} takes {count}"
        )
    if tensor.datatype in INTEGERS:  # on this wire a narrow type's values may not fit it; the caller judges them
        dtype = np.dtype(np.uint64 if field.startswith("uint") else np.int64)
    return np.fromiter(values, dtype, count)


def _check_fields(data: bytes) -> None:
    """Walk over the top-level fields without parsing what is in them."""
    at = count = 0
    while at < len(data):
        count += 1
        if count > MOST_FIELDS:
            raise invalid(f"the request has more than {MOST_FIELDS} fields")
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 1:
            at += 8
        elif kind == 2:
            size, at = _varint(data, at)
            at += size
        elif kind == 5:
            at += 4
        else:
            raise invalid("the request is not a ModelInferRequest: its bytes do not parse")
    if at != len(data):
        raise invalid("the request is not a ModelInferRequest: its bytes end too early")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise invalid("the request is not a ModelInferRequest: its bytes end too early")
