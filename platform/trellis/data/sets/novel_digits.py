"""The bundled digits cut in two: some classes to pretrain on in the open, the others for the clients."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from trellis import seeding
from trellis.data.base import DataSet
from trellis.data.sets._base import Source, held_out, split, standardized
from trellis.registry import register
from trellis.scenario import Strict

Digits = Annotated[tuple[Annotated[int, Field(ge=0, le=9)], ...], Field(min_length=2)]


@register(
    "datasets",
    "novel-digits",
    summary="digits 5 to 9 with few labels, and digits 0 to 4 to pretrain a model on",
    kind="image",
)
class NovelDigits(Source):
    """1797 real handwritten digits, of which the clients hold some classes only.

    The classes ``base_digits`` are the stream ``base`` (``splits["base"]``), the same for everybody: what a model can
    be pretrained on before the federation begins. With ``rotations`` each of its digits turned by 0, 90, 180 and 270
    degrees is a class of its own, so that there is more to learn from five digits; that is the one thing made here. The
    fact ``base_classes`` says how many classes ``base`` has. The clients' digits are as they were written.

    ``per_class`` leaves so many labelled examples of each of the clients' classes, drawn by the run's seed; the
    held-out ones are the same for every seed, and for every base. Hyperparameters are to be chosen under
    ``judged_on: validation``: as many other examples, held out of the training ones, so that no test digit has a part
    in the choice. Labels of both parts count from 0. ``x`` is ``(n, 1, size, size)``.
    """

    class Config(Strict):
        size: int = Field(8, ge=8, le=64, description="pixels a side; above 8 the images are enlarged bilinearly")
        base_digits: Digits = Field((0, 1, 2, 3, 4), description="digits for pretraining")
        client_digits: Digits = Field((5, 6, 7, 8, 9), description="digits of the clients; others than for pretraining")
        rotations: bool = Field(True, description="each base digit in four rotations, each a class")
        per_class: int | None = Field(None, ge=1, description="labelled examples of each class over all clients")
        standardize: bool = Field(True, description="mean 0 and deviation 1 over the pretraining examples")
        test_fraction: float = Field(0.2, ge=0, lt=0.5, description="held out; the same examples for every seed")
        judged_on: Literal["test", "validation"] = Field(
            "test", description="which held-out examples the cloud has; those for validation are no test examples"
        )

        @model_validator(mode="after")
        def _each_digit_once(self) -> Self:
            both = (*self.base_digits, *self.client_digits)
            if twice := sorted({digit for digit in both if both.count(digit) > 1}):
                raise ValueError(f"digit {twice[0]} stands twice in base_digits and client_digits")
            return self

    config: Config

    def load(self, seed: int) -> DataSet:
        from sklearn.datasets import load_digits

        c, digits = self.config, load_digits()
        x = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
        if c.size != x.shape[-1]:
            x = torch.nn.functional.interpolate(x, (c.size, c.size), mode="bilinear", align_corners=False)
        y = torch.from_numpy(digits.target.astype(np.int64))
        base_x, base_y = self._base(*_only(x, y, c.base_digits))
        x, y = _only(x, y, c.client_digits)
        train, test = held_out(y.numpy(), c.test_fraction)
        if c.judged_on == "validation":
            rest, other = held_out(y[train].numpy(), c.test_fraction / (1 - c.test_fraction))
            train, test = train[rest], train[other]
        kept, held = torch.from_numpy(self._few(train, y.numpy(), seed)), torch.from_numpy(test)
        (base_x, train_x, test_x), facts = standardized(base_x, [x[kept], x[held]], on=c.standardize)
        classes, base_classes = len(c.client_digits), len(c.base_digits) * (4 if c.rotations else 1)
        return DataSet(
            kind="image",
            train=split(train_x, y[kept], classes, "novel-digits, training"),
            test=split(test_x, y[held], classes, "novel-digits, test"),
            classes=tuple(map(str, c.client_digits)),
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


def _only(x: Tensor, y: Tensor, digits: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the images of some digits, in their own order, with the places of their digits among ``digits``."""
    places = torch.full((10,), -1)
    places[list(digits)] = torch.arange(len(digits))
    found = places[y]
    return x[found >= 0], found[found >= 0]
