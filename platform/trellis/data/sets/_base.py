"""What the bundled data sets share: finding files, holding out a test set, and checked tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from trellis import seeding
from trellis.data.base import DataSet, Split
from trellis.errors import DataError, listed
from trellis.scenario import Strict

HELD_OUT_SEED = 20201
"""Which examples are held out depends on this number alone, so every run is judged on the same ones."""


class Source(ABC):
    """A data set plug-in: a ``Config`` that says where the data are, and ``load`` that reads them.

    Args:
        config: the validated parameters of the scenario's ``data`` key.
        folder: where relative paths start, the scenario file's folder.
    """

    config: Strict

    def __init__(self, config: Any, folder: Path) -> None:
        self.config = config
        self.folder = folder

    @abstractmethod
    def load(self, seed: int) -> DataSet:
        """Return the data. Only data that are made up depend on ``seed``.

        Raises:
            DataError: files are missing, damaged or of another format.
        """

    def path(self, key: str, name: str) -> Path:
        """Return the existing file or folder that the parameter ``key`` names."""
        path = self.folder / name
        if not path.exists():
            raise DataError("data-missing", f"data.{key}: nothing is at {path}")
        return path


def held_out(labels: ArrayLike, fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split row numbers into training and test, the same share of every class, never changing between runs.

    A class keeps at least one training example.

    Returns:
        Sorted training rows and sorted test rows, both int64.
    """
    labels = np.asarray(labels)
    test = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(round(len(rows) * fraction), len(rows) - 1)
        generator = seeding.numpy_generator(HELD_OUT_SEED, "held-out", int(label))
        test.append(generator.permutation(rows)[:count])
    test_rows = np.sort(np.concatenate(test)) if test else np.empty(0, np.int64)
    return np.setdiff1d(np.arange(len(labels)), test_rows), test_rows


def standardized(
    train: Tensor, others: Sequence[Tensor], *, on: bool, by_channel: bool = True
) -> tuple[list[Tensor], dict[str, Any]]:
    """Shift and scale to mean 0 and deviation 1 over the training examples.

    Args:
        train: training examples.
        others: further examples, which get the same shift and scale.
        on: False leaves the values as they are.
        by_channel: each channel (dimension 1) by itself, or all values alike.

    Returns:
        All the examples, training first, and the facts ``mean`` and ``std``, one value per channel or a single one,
        for which ``x * std + mean`` is what was read.
    """
    channels = train.shape[1] if by_channel and train.ndim > 1 else 1
    if not on or not train.numel():
        return [train, *others], {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    # In double precision, as a float32 sum over millions of pixels depends on the number of threads; one channel at
    # a time, as a copy of everything in double precision may not fit.
    columns = [train[:, channel] for channel in range(channels)] if channels > 1 else [train]
    moments = [torch.var_mean(column.double(), correction=0) for column in columns]
    mean = torch.tensor([float(mean) for _, mean in moments])
    std = torch.tensor([float(var) ** 0.5 or 1.0 for var, _ in moments])  # a constant channel is only shifted
    shape = [1, channels] + [1] * (train.ndim - 2) if channels > 1 else [1] * train.ndim
    values = [(x - mean.view(shape)).div_(std.view(shape)) for x in (train, *others)]
    return values, {"mean": tuple(mean.tolist()), "std": tuple(std.tolist())}


def split(x: Tensor, y: Tensor, classes: int, source: str) -> Split:
    """Check examples and labels against each other and make a split of them.

    Raises:
        DataError: lengths differ, a value is not finite, or a label is no class.
    """
    if len(x) != len(y):
        raise DataError("data-length", f"{source}: {len(x)} examples but {len(y)} labels")
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise DataError("data-finite", f"{source}: holds NaN or infinite values")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise DataError(
            "data-labels",
            f"{source}: labels run from {int(y.min())} to {int(y.max())}; allowed are 0 to {classes - 1}",
        )
    return Split.whole(x=x, y=y)


def tensor(values: ArrayLike) -> Tensor:
    """Return an array as a tensor of its own: integers as int64, uint8 left as it is, the rest as float32."""
    array = np.asarray(values)
    if array.dtype == np.uint8:
        return torch.from_numpy(np.array(array, order="C"))
    if array.dtype.kind in "iub":
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(array.astype(np.float32))


def numbered(values: ArrayLike, names: Sequence[str] | None, source: str) -> tuple[Tensor, tuple[str, ...]]:
    """Turn labels, which are integers or text, into int64 numbers and the names of the classes.

    Integers stand for themselves, and the classes are ``names`` or ``"0"`` up to the largest; text is numbered
    in alphabetical order.
    """
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iubUSO":
        raise DataError(
            "data-labels",
            f"{source}: labels of shape {array.shape} and type {array.dtype}; expected one integer or name an example",
        )
    if array.dtype.kind in "iub":
        count = int(array.max()) + 1 if len(array) else 0
        return torch.from_numpy(array.astype(np.int64)), tuple(names or map(str, range(count)))
    texts = [str(value) for value in array.tolist()]
    classes = tuple(names or sorted(set(texts)))
    order = {name: number for number, name in enumerate(classes)}
    unknown = sorted(set(texts) - set(classes))
    if unknown:
        raise DataError("data-labels", f"{source}: label {unknown[0]!r} is none of the classes {listed(classes)}")
    return torch.tensor([order[text] for text in texts], dtype=torch.int64), classes
