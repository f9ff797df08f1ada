"""The binary record format of CIFAR-10 and CIFAR-100.

A file is a row of records: one or two label bytes, then 1024 red, 1024 green and 1024 blue bytes of a 32x32
image, row by row (https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version"). The site's "Python version"
is made of pickles, which can run code when they are read, so it is never opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trellis.data.sets._images import unit
from trellis.errors import DataError

PIXELS = 3 * 32 * 32


def locate(root: Path, binary: str, pickled: str, pickle_files: Sequence[str], needed: Sequence[str]) -> Path:
    """Return the folder with the binary files: ``root`` itself or ``root/<binary>``.

    Args:
        root: what the scenario names.
        binary: the folder name of the binary version, e.g. ``"cifar-10-batches-bin"``.
        pickled: the folder name of the Python version.
        pickle_files: files that only the Python version has.
        needed: the binary files that must be there.

    Raises:
        DataError: a file is missing, or the Python version was given.
    """
    folder = root / binary if (root / binary).is_dir() else root
    missing = [name for name in needed if not (folder / name).is_file()]
    if not missing:
        return folder
    if (root / pickled).is_dir() or any((folder / name).is_file() for name in pickle_files):
        raise DataError(
            "data-pickle",
            f"data.root: {root} holds the Python version, which is pickles and is never loaded;"
            f" unpack the binary version ({binary}) instead",
        )
    raise DataError("data-missing", f"data.root: no {missing[0]} in {folder}; expected the folder {binary}")


def records(paths: Sequence[Path], label_bytes: int, label: int) -> tuple[Tensor, Tensor]:
    """Read record files.

    Args:
        paths: the files, in order.
        label_bytes: label bytes at the start of a record, 1 or 2.
        label: which of them is the label.

    Returns:
        float32 images in [0, 1] of shape ``(n, 3, 32, 32)`` and int64 labels of shape ``(n,)``.
    """
    rows = np.concatenate([_rows(path, label_bytes + PIXELS) for path in paths])
    images = rows[:, label_bytes:].reshape(-1, 3, 32, 32)
    return unit(images), torch.from_numpy(rows[:, label].astype(np.int64))


def _rows(path: Path, length: int) -> NDArray[np.uint8]:
    values = np.fromfile(path, dtype=np.uint8)
    if len(values) == 0 or len(values) % length:
        raise DataError(
            "data-damaged", f"{path}: {len(values)} bytes; expected a positive multiple of {length}, one record each"
        )
    return values.reshape(-1, length)


def names(path: Path, count: int) -> tuple[str, ...]:
    """Read the names of the classes, one a line.

    Raises:
        DataError: the file does not hold ``count`` names.
    """
    try:
        found = tuple(line.strip() for line in path.read_text(encoding="ascii").splitlines() if line.strip())
    except UnicodeDecodeError:
        raise DataError("data-damaged", f"{path}: not plain text") from None
    if len(found) != count:
        raise DataError("data-damaged", f"{path}: {len(found)} class names; expected {count}")
    return found
