"""The bundled digits cut in two: some classes to pretrain on in the open, the others for the clients."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from trellis import seeding
from trellis.data.base import DataSet
from trellis.data.sets._base import Source, held_out, split, standardized
from trellis.registry import register
from trellis.scenario import Strict


@register(
    "datasets",
    "novel-digits",
    summary="digits 5 to 9 with few labels, and digits 0 to 4 to pretrain a model on",
    kind="image",
)
class NovelDigits(Source):
    """1797 real handwritten digits, of which the clients hold the upper classes only.

    The lower classes are the stream ``base`` (``splits["base"]``), the same for everybody: what a model can be
    pretrained on before the federation begins. With ``rotations`` each of its digits turned by 0, 90, 180 and 270
    degrees is a class of its own, so that there is more to learn from five digits; that is the one thing made here. The
    fact ``base_classes`` says how many classes ``base`` has. The clients' digits are as they were written.

    ``per_class`` leaves so many labelled examples of each of the clients' classes, drawn by the run's seed; the
    held-out ones are the same for every seed. Labels of both parts count from 0. ``x`` is ``(n, 1, size, size)``.
    """

    class Config(Strict):
        size: int = Field(8, ge=8, le=64, description="pixels a side; above 8 the images are enlarged bilinearly")
        base_digits: int = Field(5, ge=2, le=8, description="digits 0 up to this, which are for pretraining")
        rotations: bool = Field(True, description="each base digit in four rotations, each a class")
        per_class: int | None = Field(None, ge=1, description="labelled examples of each class over all clients")
        standardize: bool = Field(True, description="mean 0 and deviation 1 over the pretraining examples")
        test_fraction: float = Field(0.2, ge=0, lt=1, description="held out; the same examples for every seed")

    config: Config

    def load(self, seed: int) -> DataSet:
        from sklearn.datasets import load_digits

        c, digits = self.config, load_digits()
        x = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
        if c.size != x.shape[-1]:
            x = torch.nn.functional.interpolate(x, (c.size, c.size), mode="bilinear", align_corners=False)
        y = torch.from_numpy(digits.target.astype(np.int64))
        base_x, base_y = self._base(x[y < c.base_digits], y[y < c.base_digits])
        x, y = x[y >= c.base_digits], y[y >= c.base_digits] - c.base_digits
        train, test = held_out(y.numpy(), c.test_fraction)
        kept, held = torch.from_numpy(self._few(train, y.numpy(), seed)), torch.from_numpy(test)
        (base_x, train_x, test_x), facts = standardized(base_x, [x[kept], x[held]], on=c.standardize)
        classes, base_classes = 10 - c.base_digits, c.base_digits * (4 if c.rotations else 1)
        return DataSet(
            kind="image",
            train=split(train_x, y[kept], classes, "novel-digits, training"),
            test=split(test_x, y[held], classes, "novel-digits, test"),
            classes=tuple(str(digit) for digit in range(c.base_digits, 10)),
            facts={**facts, "base_classes": base_classes},
            splits={"base": split(base_x, base_y, base_classes, "novel-digits, base")},
        )

    def _base(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if not self.config.rotations:
            return x, y
        turned = torch.cat([torch.rot90(x, quarter, (2, 3)) for quarter in range(4)])
        return turned, torch.cat([4 * y + quarter for quarter in range(4)])

    def _few(self, rows: NDArray[np.int64], labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """Return ``per_class`` of the rows of each class, or all."""
        if self.config.per_class is None:
            return rows
        chosen = []
        for label in np.unique(labels):
            generator = seeding.numpy_generator(seed, "novel-digits", int(label))
            chosen.append(generator.permutation(rows[labels[rows] == label])[: self.config.per_class])
        return np.sort(np.concatenate(chosen))
