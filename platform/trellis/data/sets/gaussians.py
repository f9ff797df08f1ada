"""Made-up blobs, for tests and first steps."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from trellis import seeding
from trellis.data.base import DataSet
from trellis.data.sets._base import Source, split
from trellis.registry import register
from trellis.scenario import Strict


@register("datasets", "gaussians", summary="made-up Gaussian blobs, one per class", kind="image")
class Gaussians(Source):
    """One isotropic Gaussian per class. These are made-up data: good for checking that code runs, not for claims.

    Class centres are drawn from a standard normal, examples around them with deviation ``spread``; at the default
    the classes hardly overlap. Everything follows from the run's seed. ``x`` is ``(n, *shape)``: with three
    dimensions ``(channels, height, width)`` the examples pass for images, with one they are plain vectors. Both
    are of kind ``image``, which to a classifier is any one tensor per example.
    """

    class Config(Strict):
        examples: int = Field(1000, ge=1, description="training examples over all clients")
        test_examples: int = Field(200, ge=0, description="examples of the central test set")
        shape: list[int] = Field([16], min_length=1, max_length=3, description="shape of one example")
        classes: int = Field(4, ge=2)
        spread: float = Field(0.5, gt=0, description="deviation within a class; centres have deviation 1")

    config: Config

    def load(self, seed: int) -> DataSet:
        config, generator = self.config, seeding.torch_generator(seed, "gaussians")
        centres = torch.randn(config.classes, *config.shape, generator=generator)

        def draw(count: int) -> tuple[Tensor, Tensor]:
            # Equal classes in random order, so that even a small draw has every class.
            y = torch.arange(count)[torch.randperm(count, generator=generator)] % config.classes
            noise = torch.randn(count, *config.shape, generator=generator)
            return centres[y] + config.spread * noise, y

        train, test = draw(config.examples), draw(config.test_examples)
        channels = config.shape[0]
        return DataSet(
            kind="image",
            train=split(*train, config.classes, "gaussians"),
            test=split(*test, config.classes, "gaussians"),
            classes=tuple(map(str, range(config.classes))),
            facts={"mean": (0.0,) * channels, "std": (1.0,) * channels},
        )
