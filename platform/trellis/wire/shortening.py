"""Updates in fewer bits on their way back: half precision, or eight bits with one scale per array.

What is shortened is the difference to what the node received, which is small where weights are not, so that the
error is a share of the step and not of the weight. It is lossy, and off unless asked for; the relative error
``|difference - shortened| / |difference|`` (Euclidean, over all arrays) travels along.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trellis.errors import DataError
from trellis.wire.content import Content, Record
from trellis.wire.generated import link_pb2 as pb

NOTE = "shortened"
ERROR = "shortening-error"
METRICS = "metrics"


def shorten(answer: Content, received: Content, how: pb.Shortening) -> Content:
    """Return an answer whose floating-point arrays are replaced by shortened differences to those received.

    A record is shortened if a record of the same name was received with the same names and shapes; others travel as
    they are. The relative error is added to the answer's metrics under ``shortening-error``.
    """
    if how not in (pb.SHORTENING_FLOAT16, pb.SHORTENING_INT8):
        return answer
    result: Content = {}
    lost = whole = 0.0
    for name, record in answer.items():
        base = received.get(name)
        if record.kind != "arrays" or base is None or not _alike(record.values, base.values):
            result[name] = record
            continue
        short: dict[str, NDArray[Any]] = {}
        scales: list[float] = []
        for key, values in record.values.items():
            difference = np.asarray(values, np.float64) - base.values[key]
            code, scale = _code(difference, how)
            short[key] = code
            scales.append(scale)
            with np.errstate(invalid="ignore"):  # what is not finite is the admission gate's to name
                lost += float(np.square(difference - code.astype(np.float64) * scale).sum())
                whole += float(np.square(difference).sum())
        types = [str(np.asarray(values).dtype) for values in record.values.values()]
        result[name] = Record("arrays", short, {NOTE: name, "scales": scales, "types": types})
    metrics = result.get(METRICS)
    if metrics is not None and any(NOTE in record.notes for record in result.values()):
        error = math.sqrt(lost / whole) if whole and math.isfinite(whole) else 0.0
        result[METRICS] = Record(metrics.kind, {**metrics.values, ERROR: error}, metrics.notes)
    return result


def restore(answer: Content, sent: Content) -> Content:
    """Return the answer with its shortened records made whole again from what was sent.

    Raises:
        DataError: a shortened record does not fit what was sent.
    """
    result: Content = {}
    for name, record in answer.items():
        if NOTE not in record.notes:
            result[name] = record
            continue
        base = sent.get(str(record.notes[NOTE]))
        scales, types = record.notes.get("scales"), record.notes.get("types")
        if record.kind != "arrays" or base is None or not isinstance(scales, list) or not isinstance(types, list):
            raise DataError("payload-shortened", f"record {name!r:.60} is shortened against nothing that was sent")
        shapes = {key: np.shape(value) for key, value in record.values.items()}
        if shapes != {key: np.shape(value) for key, value in base.values.items()} or not (
            len(scales) == len(types) == len(shapes)
        ):
            raise DataError("payload-shortened", f"record {name!r:.60} is shortened against arrays of other shapes")
        whole: dict[str, NDArray[Any]] = {}
        for (key, code), scale, dtype in zip(record.values.items(), scales, types, strict=True):
            if dtype not in ("float64", "float32", "float16") or not isinstance(scale, float):
                raise DataError("payload-shortened", f"{name}/{key}: type {dtype!r:.20} or scale {scale!r:.20}")
            whole[key] = (np.asarray(base.values[key], np.float64) + code.astype(np.float64) * scale).astype(dtype)
        result[name] = Record("arrays", whole)
    return result


def _alike(answer: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    return answer.keys() == base.keys() and all(
        np.asarray(values).dtype.kind == "f" and np.shape(values) == np.shape(base[key])
        for key, values in answer.items()
    )


def _code(difference: NDArray[np.float64], how: pb.Shortening) -> tuple[NDArray[Any], float]:
    """Return a difference in fewer bits, and what to multiply it by."""
    largest = float(np.abs(difference).max(initial=0.0))
    if not math.isfinite(largest):
        return difference.astype(np.float32), 1.0  # for the admission gate to see and name
    if how == pb.SHORTENING_FLOAT16:
        scale = largest / 60_000 if largest > 60_000 else 1.0  # half precision ends at 65,504
        return (difference / scale).astype(np.float16), scale
    scale = largest / 127 if largest else 1.0
    return np.rint(difference / scale).astype(np.int8), scale
