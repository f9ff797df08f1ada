"""The handwritten digits that come with scikit-learn: real data without a download."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from trellis.data.base import DataSet
from trellis.data.sets._base import Source, held_out
from trellis.data.sets._images import image_data
from trellis.registry import register
from trellis.scenario import Strict


@register(
    "datasets", "digits", summary="1797 handwritten digits of 8x8 pixels, bundled with scikit-learn", kind="image"
)
class Digits(Source):
    """The test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI, 1998).

    43 people wrote the digits; grey values 0 to 16 become [0, 1]. The data do not say who wrote which, so there
    are no natural ids. ``x`` is ``(n, channels, size, size)``.
    """

    class Config(Strict):
        size: int = Field(8, ge=8, le=64, description="pixels a side; above 8 the images are enlarged bilinearly")
        channels: Literal[1, 3] = Field(1, description="3 repeats the grey values")
        standardize: bool = Field(True, description="mean 0 and deviation 1 over the training examples")
        test_fraction: float = Field(0.2, ge=0, lt=1, description="held out; the same examples for every seed")

    config: Config

    def load(self, seed: int) -> DataSet:
        from sklearn.datasets import load_digits

        del seed  # real data; the held-out part must not move with the seed
        digits = load_digits()
        x = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
        if self.config.size != x.shape[-1]:
            side = (self.config.size, self.config.size)
            x = torch.nn.functional.interpolate(x, side, mode="bilinear", align_corners=False)
        x = x.repeat(1, self.config.channels, 1, 1)
        y = torch.from_numpy(digits.target.astype(np.int64))
        train, test = (torch.from_numpy(rows) for rows in held_out(digits.target, self.config.test_fraction))
        return image_data(
            (x[train], y[train]),
            (x[test], y[test]),
            tuple(map(str, range(10))),
            standardize=self.config.standardize,
            source="digits",
        )
