"""NumPy archives: one's own arrays, or MedMNIST's files as they are published."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from trellis.data.base import DataSet
from trellis.data.sets._base import Source, numbered, split, standardized, tensor
from trellis.data.sets._images import unit
from trellis.errors import DataError, listed, nearest
from trellis.registry import register
from trellis.scenario import Strict

_MEDMNIST = {
    "x_train": "train_images",
    "y_train": "train_labels",
    "x_test": "test_images",
    "y_test": "test_labels",
    "x_val": "val_images",
    "y_val": "val_labels",
}


@register("datasets", "npz", summary="arrays of a NumPy .npz archive, MedMNIST's layout included")
class Npz(Source):
    """Arrays of a ``.npz`` archive. Archives that need pickle (arrays of Python objects) are refused.

    MedMNIST's keys (``train_images`` ...; Yang et al., Scientific Data 2023) are recognised by themselves, and its
    validation part becomes the stream ``val``. Images may be ``(n, h, w)``, ``(n, h, w, c)`` or ``(n, c, h, w)``;
    uint8 becomes [0, 1]. Labels are integers or text, ``(n,)`` or ``(n, 1)``.
    """

    class Config(Strict):
        path: str = Field(description="the .npz file")
        x_train: str = "x_train"
        y_train: str = "y_train"
        x_test: str = "x_test"
        y_test: str = "y_test"
        x_val: str = "x_val"
        y_val: str = "y_val"
        id_key: str | None = Field(None, description="array with one user or site per training example")
        kind: Literal["image", "tokens", "series", "graph", "points", "events"] = "image"
        classes: list[str] | None = Field(None, description="names of the classes; '0', '1', ... if not given")
        standardize: bool = Field(True, description="mean 0 and deviation 1, of images per channel; not of integers")

    config: Config

    def load(self, seed: int) -> DataSet:
        del seed  # real data with a test set of their own
        path = self.path("path", self.config.path)
        arrays = _read(path, self._keys(path))
        names = ("train", "test", "val") if "x_val" in arrays else ("train", "test")
        labels = np.concatenate([_column(arrays[f"y_{name}"], f"{path}, {name}") for name in names])
        y, classes = numbered(labels, self.config.classes, str(path))
        x = [self._examples(arrays[f"x_{name}"], f"{path}, {name}") for name in names]
        facts: dict[str, Any] = {}
        if all(each.is_floating_point() for each in x):
            x, facts = standardized(x[0], x[1:], on=self.config.standardize, by_channel=self.config.kind == "image")
        parts = torch.split(y, [len(arrays[f"y_{name}"]) for name in names])
        splits = {
            name: split(each, label, len(classes), f"{path}, {name}")
            for name, each, label in zip(names, x, parts, strict=True)
        }
        train, test = splits.pop("train"), splits.pop("test")
        ids = arrays.get("id")
        if ids is not None and (ids.ndim != 1 or len(ids) != len(train)):
            raise DataError(
                "data-length", f"{path}: {self.config.id_key} has shape {ids.shape}; expected ({len(train)},)"
            )
        natural_id = None if ids is None else tuple(map(str, ids.tolist()))
        return DataSet(self.config.kind, train, test, classes, natural_id, facts, splits)

    def _keys(self, path: Path) -> dict[str, str]:
        """Return the archive's key of each part, MedMNIST's where the configured ones are not there."""
        with _open(path) as archive:
            there = set(archive.files)
        own = {part: getattr(self.config, part) for part in _MEDMNIST}
        # Keys that the scenario names itself are never replaced.
        guess = not self.config.model_fields_set & set(_MEDMNIST)
        keys = _MEDMNIST if guess and own["x_train"] not in there and _MEDMNIST["x_train"] in there else own
        keys = {part: key for part, key in keys.items() if not part.endswith("_val") or key in there}
        if self.config.id_key is not None:
            keys = {**keys, "id": self.config.id_key}
        for part, key in keys.items():
            if key not in there:
                name = "id_key" if part == "id" else part
                raise DataError(
                    "data-key",
                    f"data.{name}: {path} has no array {key!r}.{nearest(key, there)} It has: {listed(there)}",
                )
        return keys

    def _examples(self, array: NDArray[Any], source: str) -> Tensor:
        """Return examples as the data set holds them; images get their channels first."""
        if array.dtype.kind not in "iubf":
            raise DataError("data-type", f"{source}: examples of type {array.dtype}; expected numbers")
        if self.config.kind != "image":
            return tensor(array)
        if array.ndim not in (3, 4):
            raise DataError(
                "data-shape", f"{source}: images of shape {array.shape}; expected (n, h, w) or (n, h, w, c)"
            )
        if array.ndim == 3:
            array = array[:, None]
        elif array.shape[3] in (1, 3, 4) and array.shape[1] not in (1, 3, 4):
            array = array.transpose(0, 3, 1, 2)
        return unit(tensor(array)) if array.dtype == np.uint8 else tensor(array).float()


def _column(labels: NDArray[Any], source: str) -> NDArray[Any]:
    if labels.ndim == 2 and labels.shape[1] == 1:
        return labels[:, 0]
    if labels.ndim != 1:
        raise DataError(
            "data-labels", f"{source}: labels of shape {labels.shape}; expected one an example, (n,) or (n, 1)"
        )
    return labels


def _open(path: Path) -> NpzFile:
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError("data-damaged", f"{path}: not readable as a .npz archive: {error}") from None
    if not isinstance(archive, NpzFile):
        raise DataError("data-damaged", f"{path}: one array, not a .npz archive of named arrays")
    return archive


def _read(path: Path, keys: dict[str, str]) -> dict[str, NDArray[Any]]:
    arrays = {}
    with _open(path) as archive:
        for part, key in keys.items():
            try:
                arrays[part] = archive[key]
            except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise DataError("data-damaged", f"{path}: array {key!r} is not readable: {error}") from None
    return arrays
