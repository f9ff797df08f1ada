"""What a device keeps over a restart: arrays and plain values in one file that is whole at every instant."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trellis.errors import RunError

FORMAT = 1
VALUES = "values.json"


def write(path: Path, values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a state so that a kill, or a loss of power, leaves this one or the one before."""
    replace(path, packed(values, arrays))


def packed(values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return values that JSON knows and arrays of numbers as bytes: NumPy's ``.npz`` with one JSON entry."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(VALUES, json.dumps({"format": FORMAT, **values}))
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
            archive.writestr(f"{name}.npy", member.getvalue())
    return content.getvalue()


def read(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the values and arrays of a state.

    Raises:
        RunError: the file is damaged or of another format. A missing file is ``FileNotFoundError``.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            values = json.loads(archive.read(VALUES))
            arrays = {
                name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
                for name in archive.namelist()
                if name != VALUES
            }
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise RunError("edge-state", f"{path} is no state of a device: {type(error).__name__}: {error}") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise RunError("edge-state", f"{path} is a state of another version; this one reads format {FORMAT}")
    return values, arrays


def replace(path: Path, content: bytes) -> None:
    """Put content under a name in one step, and see it to the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
