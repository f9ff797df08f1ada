"""The bundled digits in motion, as an event camera would report them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from trellis import seeding
from trellis.data.base import DataSet
from trellis.data.sets._base import Source, held_out, split
from trellis.errors import DataError
from trellis.registry import register
from trellis.scenario import Strict


@register(
    "datasets",
    "moving-digit-events",
    summary="handwritten digits on a made-up walk, as on and off events",
    kind="events",
)
class MovingDigitEvents(Source):
    """1797 handwritten digits (scikit-learn's), each moved over a canvas and turned into events.

    Real: the images, their labels, and which of them are held out. Made up: everything that moves. A digit starts at a
    place of its own, goes one pixel a step straight or askew, and bounces off the canvas's border; between two
    positions every pixel that grows brighter by more than ``threshold`` of full brightness reports an "on" event, one
    that grows darker an "off" event. ``noise`` is the chance of a pixel to report what did not happen. No camera was
    involved: a real one has pixels that fire by themselves at times of their own, here all report once a step.

    ``x`` is ``(n, steps, 2, size, size)`` of zeros and ones, float32, channels on and off. Walks and noise follow from
    the run's seed.
    """

    class Config(Strict):
        size: int = Field(10, ge=9, le=64, description="pixels a side of the canvas; the digits have 8")
        steps: int = Field(6, ge=1, le=100)
        threshold: float = Field(0.2, gt=0, lt=1)
        noise: float = Field(0.01, ge=0, lt=1, description="chance of a false event, for each pixel, step and sign")
        test_fraction: float = Field(0.2, ge=0, lt=1, description="held out; the same examples for every seed")

    config: Config

    def load(self, seed: int) -> DataSet:
        from sklearn.datasets import load_digits

        digits, generator = load_digits(), seeding.numpy_generator(seed, "moving-digit-events")
        if self.config.size < digits.images.shape[1]:
            raise DataError("data-shape", f"data.size is {self.config.size}; the digits have 8 pixels a side")
        places = self.walks(len(digits.target), generator)
        frames = drawn(digits.images.astype(np.float32) / 16, places, self.config.size)
        x = events(frames, self.config.threshold)
        false = generator.random(x.shape, dtype=np.float32) < self.config.noise
        events_of = torch.from_numpy(x | false).float()
        y = torch.from_numpy(digits.target.astype(np.int64))
        train, test = (torch.from_numpy(rows) for rows in held_out(digits.target, self.config.test_fraction))

        def part(rows: Tensor) -> tuple[Tensor, Tensor, int, str]:
            return events_of[rows], y[rows], 10, "moving-digit-events"

        return DataSet("events", split(*part(train)), split(*part(test)), classes=tuple(map(str, range(10))))

    def walks(self, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """Return each digit's upper left corner before every step and after the last, ``(count, steps + 1, 2)``."""
        room, steps = self.config.size - 8, np.arange(self.config.steps + 1)
        start = generator.integers(0, room + 1, size=(count, 2))
        ways = np.array([(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b])
        along = start[:, None] + steps[:, None] * ways[generator.integers(len(ways), size=count)][:, None]
        bounced: NDArray[np.int64] = room - np.abs(along % (2 * room) - room)
        return bounced


def drawn(images: NDArray[np.float32], places: NDArray[np.int64], size: int) -> NDArray[np.float32]:
    """Return ``(n, positions, size, size)``: each 8x8 image at each of its positions on an empty canvas."""
    n, positions, _ = places.shape
    canvas = np.zeros((n, positions, size, size), np.float32)
    rows = places[:, :, 0, None, None] + np.arange(8)[:, None]
    columns = places[:, :, 1, None, None] + np.arange(8)
    canvas[np.arange(n)[:, None, None, None], np.arange(positions)[:, None, None], rows, columns] = images[:, None]
    return canvas


def events(frames: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Return ``(n, steps, 2, h, w)``: where a pixel of ``(n, steps + 1, h, w)`` grew brighter, and where darker."""
    change = np.diff(frames, axis=1)
    return np.stack([change > threshold, change < -threshold], axis=2)
