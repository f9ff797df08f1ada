"""CIFAR-100 from its binary files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trellis.data.base import DataSet
from trellis.data.sets import _cifar
from trellis.data.sets._base import Source
from trellis.data.sets._images import image_data
from trellis.registry import register
from trellis.scenario import Strict

# A record starts with its coarse label, then its fine one.
_LABELS = {"coarse": (0, 20), "fine": (1, 100)}


@register("datasets", "cifar100", summary="CIFAR-100, 60,000 colour images of 32x32, binary version", kind="image")
class Cifar100(Source):
    """CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009).

    ``root`` is the unpacked folder ``cifar-100-binary`` or its parent. ``x`` is ``(n, 3, 32, 32)``.
    """

    class Config(Strict):
        root: str = Field(description="the folder cifar-100-binary, or the one it lies in")
        label: Literal["fine", "coarse"] = Field("fine", description="100 classes, or their 20 superclasses")
        standardize: bool = Field(True, description="mean 0 and deviation 1 per channel over the training examples")

    config: Config

    def load(self, seed: int) -> DataSet:
        del seed  # real data with a test set of their own
        byte, count = _LABELS[self.config.label]
        names = f"{self.config.label}_label_names.txt"
        folder = _cifar.locate(
            self.path("root", self.config.root),
            "cifar-100-binary",
            "cifar-100-python",
            ("train", "meta"),
            ("train.bin", "test.bin", names),
        )
        return image_data(
            _cifar.records([folder / "train.bin"], 2, byte),
            _cifar.records([folder / "test.bin"], 2, byte),
            _cifar.names(folder / names, count),
            standardize=self.config.standardize,
            source=str(folder),
        )
