"""Images in one folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from trellis.data.base import DataSet
from trellis.data.sets._base import Source, held_out
from trellis.data.sets._images import SUFFIXES, image_data, read, unit
from trellis.errors import DataError, listed
from trellis.registry import register
from trellis.scenario import Strict


@register("datasets", "image-folder", summary="images in one folder per class", kind="image")
class ImageFolder(Source):
    """Images as ``root/train/<class>/*`` and ``root/test/<class>/*``, or as ``root/<class>/*``.

    Without a ``test`` folder a fixed, stratified ``test_fraction`` is held out. Names that start with a dot are
    passed over; any other file that is no image is an error, because a half-read data set looks like a bad model.
    """

    class Config(Strict):
        root: str = Field(description="the folder")
        size: int = Field(32, ge=1, le=1024, description="pixels a side; images are resized bilinearly")
        channels: Literal[1, 3] = 3
        standardize: bool = Field(True, description="mean 0 and deviation 1 per channel over the training examples")
        test_fraction: float = Field(0.2, ge=0, lt=1, description="held out where there is no test folder")

    config: Config

    def load(self, seed: int) -> DataSet:
        del seed  # real data; the held-out part must not move with the seed
        root = self.path("root", self.config.root)
        train_root = root / "train" if (root / "train").is_dir() else root
        classes = _classes(train_root)
        x, y = self._read(train_root, classes)
        if train_root != root and (root / "test").is_dir():
            unknown = set(_classes(root / "test")) - set(classes)
            if unknown:
                raise DataError(
                    "data-labels",
                    f"{root / 'test' / min(unknown)}: no such class under {train_root}; there are {listed(classes)}",
                )
            train, test = (x, y), self._read(root / "test", classes)
        else:
            kept, out = (torch.from_numpy(rows) for rows in held_out(y.numpy(), self.config.test_fraction))
            train, test = (x[kept], y[kept]), (x[out], y[out])
        return image_data(train, test, classes, standardize=self.config.standardize, source=str(root))

    def _read(self, root: Path, classes: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        size, channels = self.config.size, self.config.channels
        images, labels = [], []
        for label, name in enumerate(classes):
            for path in _visible(root / name) if (root / name).is_dir() else []:
                if path.suffix.lower() not in SUFFIXES or not path.is_file():
                    raise DataError("data-stray", f"{path}: not an image file; allowed endings: {listed(SUFFIXES)}")
                images.append(read(path, size, channels))
                labels.append(label)
        if not images:
            raise DataError("data-empty", f"{root}: no image in its class folders {listed(classes)}")
        return unit(np.stack(images)), torch.tensor(labels, dtype=torch.int64)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _classes(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise DataError("data-missing", f"data.root: {root} is not a folder")
    for path in _visible(root):
        if not path.is_dir():
            raise DataError("data-stray", f"{path}: a file among the class folders")
    classes = tuple(path.name for path in _visible(root))
    if not classes:
        raise DataError("data-empty", f"{root}: no class folders")
    return classes
