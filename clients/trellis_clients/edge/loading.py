"""From files to what is served."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trellis.errors import DataError
from trellis_clients.edge.model import Model
from trellis_clients.edge.model_file import Limits
from trellis_clients.edge.session import OnnxPredictor

LARGEST_SOURCE = 64 << 20
"""Bytes of a file of clean examples: 32 of them do, and they stay in memory."""


def load(path: Path, name: str, threads: int = 1) -> Model:
    """Return the model of a file made by ``trellis export``.

    Raises:
        DataError: there is no such file, or it is refused (see ``trellis_clients.edge.model_file``).
    """
    limits = Limits()
    try:
        with path.open("rb") as file:
            blob = file.read(limits.bytes + 1)
    except OSError as error:
        raise DataError("onnx-missing", f"no model can be read from {path}: {error.strerror}") from None
    predictor = OnnxPredictor(blob, threads, limits)
    preprocessing = predictor.preprocessing if len(predictor.shape) == 3 else None
    if preprocessing is not None:
        for key, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            usable = np.isfinite(values).all() and (key == "mean" or min(values, default=0.0) > 0)
            if len(values) not in (1, predictor.shape[0]) or not usable:
                raise DataError(
                    "edge-preprocessing",
                    f"{path}: preprocessing.{key} is {values}; expected one finite value, or one for each of "
                    f"{predictor.shape[0]} channels, and a deviation above zero",
                )
    return Model(predictor, name, hashlib.sha256(blob).hexdigest(), preprocessing, "x", predictor.about.weights)


def source(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return clean examples ``(n, *shape)`` from the array ``x`` of an ``.npz`` file.

    Raises:
        DataError: there is no such file or array, or the array does not fit the model.
    """
    try:
        if path.stat().st_size > LARGEST_SOURCE:
            raise DataError("edge-source", f"{path} has {path.stat().st_size} bytes; at most {LARGEST_SOURCE}")
        with np.load(path, allow_pickle=False) as archive:
            x = archive["x"]
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        raise DataError("edge-source", f"{path} is no .npz with an array 'x': {error}") from None
    if x.dtype.kind != "f" or x.shape[1:] != shape or not len(x) or not np.isfinite(x).all():
        raise DataError(
            "edge-source",
            f"{path}: 'x' is {x.dtype} of shape {x.shape}; expected finite floats (n, {', '.join(map(str, shape))})",
        )
    clean: NDArray[np.float32] = x.astype(np.float32)
    return clean
