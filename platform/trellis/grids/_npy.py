"""Read the payload of a Flower ``Array`` that a stranger sent, without copying it and without trusting it.

``numpy.load`` allocates what the header declares before it looks at how much came. Here the header is
read first and compared with the length of the payload; the values are then a read-only view of the bytes.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array
from numpy.lib import format as npy
from numpy.typing import NDArray

from trellis.records import NPY_STYPE, LiveArray, name_of

NUMBERS = "biufc"
"""Kinds of dtype that hold numbers."""

MAX_HEADER = 4096
"""Characters of a header that are parsed at most; NumPy writes some eighty."""


class PayloadError(ValueError):
    """An array's payload is not what the array says it is. The message is one line, without the array's name."""


def opened(array: Array) -> NDArray[Any]:
    """Return an array's values as a view of what came; no allocation of the size declared ever happens.

    Raises:
        PayloadError: not a NumPy payload; a header that is damaged, declares objects, or contradicts the
            declared shape and dtype; more or fewer bytes than declared.
    """
    if array.stype != NPY_STYPE:
        raise PayloadError(f"is serialised as {array.stype!r}, not {NPY_STYPE!r}")
    if type(array) is LiveArray:
        values = array.view()
        # A live array that was made from these values and not changed since.
        if array.shape == values.shape and array.dtype == name_of(values.dtype) and values.dtype.kind in NUMBERS:
            return values
    shape, dtype = declared(array)
    if isinstance(array, LiveArray):
        values = array.view()
        if values.shape != shape or values.dtype != dtype:
            raise PayloadError(f"declares {dtype}{list(shape)} and holds {values.dtype}{list(values.shape)}")
        return values
    data = array.data
    size = math.prod(shape) * dtype.itemsize
    header = _canonical_header(dtype, shape)
    if data.startswith(header):
        start, order = len(header), "C"
    else:
        start, order = _parsed_header(data, shape, dtype)
    if len(data) - start != size:
        raise PayloadError(f"declares {dtype}{list(shape)}, {size} bytes, and carries {len(data) - start}")
    values = np.frombuffer(data, dtype, offset=start) if size else np.empty(0, dtype)
    return values.reshape(shape, order="F" if order == "F" else "C")


def declared(array: Array) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and dtype that an array says it has. Raises PayloadError if there can be no such array."""
    try:
        if not isinstance(array.dtype, str):  # NumPy would read None as float64
            raise TypeError
        dtype = np.dtype(array.dtype)
    except (TypeError, ValueError, SyntaxError):
        raise PayloadError(f"declares the unknown dtype {str(array.dtype)[:40]!r}") from None
    if dtype.kind not in NUMBERS:
        raise PayloadError(f"declares dtype {str(array.dtype)[:40]!r}, which holds no numbers")
    shape = tuple(array.shape)
    if not all(type(length) is int and length >= 0 for length in shape):
        raise PayloadError(f"declares the impossible shape {str(shape)[:60]}")
    return shape, dtype


@lru_cache(maxsize=4096)
def _canonical_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the header ``numpy.save`` writes. Comparing bytes is twenty times faster than parsing them."""
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _parsed_header(data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, str]:
    """Return where the values start, and their order, of a header that is not byte for byte the usual one."""
    stream = io.BytesIO(data[: MAX_HEADER + 64])
    try:
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise PayloadError(f"is in version {version} of the npy format; (1, 0) and (2, 0) are read")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        found_shape, fortran, found_dtype = read(stream, max_header_size=MAX_HEADER)
    except PayloadError:
        raise
    except Exception as error:  # the parser meets hostile text: whatever it raises, the payload is at fault
        raise PayloadError(f"has no readable npy header ({type(error).__name__})") from None
    if (found_shape, found_dtype) != (shape, dtype):
        raise PayloadError(f"declares {dtype}{list(shape)}, but its header says {found_dtype}{list(found_shape)}")
    return stream.tell(), "F" if fortran else "C"
