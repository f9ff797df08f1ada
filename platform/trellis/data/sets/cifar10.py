"""CIFAR-10 from its binary files."""

from __future__ import annotations

from pydantic import Field

from trellis.data.base import DataSet
from trellis.data.sets import _cifar
from trellis.data.sets._base import Source
from trellis.data.sets._images import image_data
from trellis.registry import register
from trellis.scenario import Strict

_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST = "test_batch.bin"
_NAMES = "batches.meta.txt"


@register("datasets", "cifar10", summary="CIFAR-10, 60,000 colour images of 32x32, binary version", kind="image")
class Cifar10(Source):
    """CIFAR-10 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009).

    ``root`` is the unpacked folder ``cifar-10-batches-bin`` or its parent. ``x`` is ``(n, 3, 32, 32)``.
    """

    class Config(Strict):
        root: str = Field(description="the folder cifar-10-batches-bin, or the one it lies in")
        standardize: bool = Field(True, description="mean 0 and deviation 1 per channel over the training examples")

    config: Config

    def load(self, seed: int) -> DataSet:
        del seed  # real data with a test set of their own
        folder = _cifar.locate(
            self.path("root", self.config.root),
            "cifar-10-batches-bin",
            "cifar-10-batches-py",
            ("data_batch_1", "batches.meta"),
            (*_TRAIN, _TEST, _NAMES),
        )
        return image_data(
            _cifar.records([folder / name for name in _TRAIN], 1, 0),
            _cifar.records([folder / _TEST], 1, 0),
            _cifar.names(folder / _NAMES, 10),
            standardize=self.config.standardize,
            source=str(folder),
        )
