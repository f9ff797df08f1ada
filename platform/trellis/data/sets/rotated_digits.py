"""The bundled digits with their rotations as classes of their own."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from trellis.data.base import DataSet
from trellis.data.sets._base import Source, held_out
from trellis.data.sets._images import image_data
from trellis.registry import register
from trellis.scenario import Strict

Angle = Literal[0, 90, 180, 270]


@register(
    "datasets", "rotated-digits", summary="the bundled digits; each turned by quarters is another class", kind="image"
)
class RotatedDigits(Source):
    """1797 real handwritten digits, where every digit turned by 0, 90, 180 or 270 degrees is a class: 40 in all.

    That is how Omniglot's 1623 characters became 6492 classes (Santoro et al., 2016). Here it serves for having
    many classes without a download, at a price: a 0 or an 8 on its head is a 0 or an 8, a 1 nearly so, and a 6 on
    its head is a 9. So some of these classes cannot be told apart, by no method; what is trained on all data at
    once shows how much that costs. ``rotations: [0, 90]`` leaves those pairs out, and 20 classes.

    Classes are in the order of the digits: ``0@0, 0@90, 0@180, 0@270, 1@0, ...``, so the first half of the classes
    are the digits 0 to 4. An image is held out or not together with all its rotations. ``x`` is
    ``(n, 1, size, size)``.
    """

    class Config(Strict):
        size: int = Field(16, ge=8, le=64, description="pixels a side; above 8 the images are enlarged bilinearly")
        rotations: Annotated[tuple[Angle, ...], Field(min_length=1)] = Field(
            (0, 90, 180, 270), description="degrees, anticlockwise"
        )
        standardize: bool = Field(True, description="mean 0 and deviation 1 over the training examples")
        test_fraction: float = Field(0.2, ge=0, lt=1, description="held out; the same examples for every seed")

        def model_post_init(self, _: object) -> None:
            if len(set(self.rotations)) != len(self.rotations):
                raise ValueError(f"rotations {list(self.rotations)} name an angle twice")

    config: Config

    def load(self, seed: int) -> DataSet:
        from sklearn.datasets import load_digits

        del seed  # real data; the held-out part must not move with the seed
        digits = load_digits()
        x = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
        if self.config.size != x.shape[-1]:
            side = (self.config.size, self.config.size)
            x = torch.nn.functional.interpolate(x, side, mode="bilinear", align_corners=False)
        y = torch.from_numpy(digits.target.astype(np.int64))
        train, test = (torch.from_numpy(rows) for rows in held_out(digits.target, self.config.test_fraction))
        return image_data(
            self._turned(x[train], y[train]),
            self._turned(x[test], y[test]),
            tuple(f"{digit}@{angle}" for digit in range(10) for angle in self.config.rotations),
            standardize=self.config.standardize,
            source="rotated-digits",
        )

    def _turned(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        angles = self.config.rotations
        images = torch.cat([torch.rot90(x, angle // 90, (2, 3)) for angle in angles])
        labels = torch.cat([y * len(angles) + position for position in range(len(angles))])
        return images, labels
