"""The bundled digits as a labelled source domain and as target domains that look otherwise."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from trellis import seeding
from trellis.data.base import DataSet
from trellis.data.sets._base import HELD_OUT_SEED, Source, held_out, split, standardized
from trellis.registry import register
from trellis.scenario import Strict


@register(
    "datasets",
    "shifted-digits",
    summary="digits turned, paler and noisy as target domains; other digits as the source",
    kind="image",
)
class ShiftedDigits(Source):
    """1797 real handwritten digits, some as they are, the others changed: for adaptation between domains.

    The streams ``source-0``, ``source-1``, ... hold the labelled source images: one set of scans, turned by each of
    ``source_angles``. Training and test examples are *other* scans of the target domains, one domain for each of
    ``angles``: turned by so many degrees (anticlockwise, bilinearly), their contrast lowered towards mid-grey, and
    Gaussian noise added. So the digits are real and the shift is made. It is the same for every seed. An example's
    natural id is its domain's angle; the partitioner ``natural-id`` makes every domain a client. Labels of target
    examples are there for judging; a method for unlabeled targets must not read them.

    Standardised by the source. ``x`` is ``(n, 1, size, size)``.
    """

    class Config(Strict):
        size: int = Field(16, ge=8, le=64, description="pixels a side; above 8 the images are enlarged bilinearly")
        angles: Annotated[tuple[float, ...], Field(min_length=1)] = Field((25.0,), description="degrees, by domain")
        contrast: float = Field(0.7, gt=0, le=1, description="of the target images; 1 leaves them")
        noise: float = Field(0.1, ge=0, description="deviation of the noise on target pixels in [0, 1]")
        source_angles: Annotated[tuple[float, ...], Field(min_length=1)] = Field((0.0,), description="one a source")
        source_fraction: float = Field(0.4, gt=0, lt=1, description="share of the scans that are the source's")
        standardize: bool = Field(True, description="mean 0 and deviation 1 over the source")
        test_fraction: float = Field(0.2, ge=0, lt=1, description="of the target, held out; the same for every seed")

    config: Config

    def load(self, seed: int) -> DataSet:
        from sklearn.datasets import load_digits

        del seed  # neither scans nor shift move with the seed
        c, digits = self.config, load_digits()
        x = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
        if c.size != x.shape[-1]:
            x = F.interpolate(x, (c.size, c.size), mode="bilinear", align_corners=False)
        y = torch.from_numpy(digits.target.astype(np.int64))
        target, source = (torch.from_numpy(rows) for rows in held_out(digits.target, c.source_fraction))
        domain = torch.arange(len(target)) % len(c.angles)
        images = self._shifted(x[target], domain)
        rest, held = (torch.from_numpy(rows) for rows in held_out(y[target].numpy(), c.test_fraction))
        sources = [turned(x[source], torch.full((len(source),), angle)) for angle in c.source_angles]
        (sources[0], *others), facts = standardized(
            sources[0], [*sources[1:], images[rest], images[held]], on=c.standardize
        )
        *more, train, test = others
        names = tuple(map(str, range(10)))
        return DataSet(
            kind="image",
            train=split(train, y[target][rest], 10, "shifted-digits, training"),
            test=split(test, y[target][held], 10, "shifted-digits, test"),
            classes=names,
            natural_id=[f"{c.angles[int(each)]:g} degrees" for each in domain[rest]],
            facts=facts,
            splits={
                f"source-{number}": split(each, y[source], 10, f"shifted-digits, source {number}")
                for number, each in enumerate([sources[0], *more])
            },
        )

    def _shifted(self, x: Tensor, domain: Tensor) -> Tensor:
        c = self.config
        x = turned(x, torch.tensor(c.angles)[domain])
        generator = seeding.torch_generator(HELD_OUT_SEED, "shifted-digits")
        noise = torch.randn(x.shape, generator=generator)
        return (0.5 + c.contrast * (x - 0.5) + c.noise * noise).clamp(0, 1)


def turned(x: Tensor, degrees: Tensor) -> Tensor:
    """Turn images ``(n, channels, side, side)`` anticlockwise about their centre, each by its own angle ``(n,)``."""
    radians = degrees * (math.pi / 180)
    cosine, sine, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    # The grid says where each new pixel comes from; rows count downwards.
    matrix = torch.stack([torch.stack([cosine, -sine, zero], 1), torch.stack([sine, cosine, zero], 1)], 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)
