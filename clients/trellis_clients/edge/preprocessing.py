"""From pixels to what a model takes, and back to what is uploaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Preprocessing:
    """Images are standardised: ``(pixels - mean) / std``, pixels in [0, 1].

    Attributes:
        mean: per channel, or a single value for all.
        std: likewise, above zero.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def to_inputs(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Return pixels in [0, 1], ``(n, channels, height, width)``, as the model's inputs."""
        mean, std = self._per_channel()
        return (np.asarray(pixels, np.float32) - mean) / std

    def to_pixels(self, inputs: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the model's inputs as 8-bit pixels; what lies outside is clipped."""
        mean, std = self._per_channel()
        pixels = np.clip(np.asarray(inputs, np.float32) * std + mean, 0, 1)
        rounded: NDArray[np.uint8] = np.round(pixels * 255).astype(np.uint8)
        return rounded

    def _per_channel(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        mean, std = (np.asarray(values, np.float32).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std
