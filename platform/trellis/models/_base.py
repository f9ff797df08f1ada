"""What every classifier offers: features before the head, and the head.

Methods that calibrate, replace or personalise the last layer rely on these two.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from trellis.errors import DataError
from trellis.scenario import Strict

Shape = tuple[int, ...]
Norm = Literal["none", "batch", "group"]


class Classifier(nn.Module, ABC):
    """A network whose output is ``head(features(x))``.

    Attributes:
        head: the last layer, from D features to one logit per class.
    """

    head: nn.Linear

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Return features of shape ``(n, D)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``(n, classes)``."""
        logits: Tensor = self.head(self.features(x))
        return logits


class Model(Protocol):
    """A model plug-in: a ``Config``, and ``build``. Weights are drawn from torch's current generator."""

    def __init__(self, config: Any) -> None: ...

    def build(self, shape: Shape, num_classes: int, facts: Mapping[str, Any]) -> nn.Module:
        """Return a model for examples of ``shape`` (without the batch).

        Raises:
            DataError: the model does not take examples of that shape.
        """


class Plain:
    """A model plug-in that only keeps its config."""

    config: Strict

    def __init__(self, config: Any) -> None:
        self.config = config


def image_shape(shape: Shape, model: str, smallest: int) -> tuple[int, int, int]:
    """Return ``(channels, height, width)``, or say why a model cannot take these examples."""
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise DataError(
            "model-shape",
            f"model {model!r} takes images of shape (channels, height, width) of at least {smallest}x{smallest}"
            f" pixels; these examples have shape {shape}",
        )
    return shape[0], shape[1], shape[2]


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """Return a normalisation layer for feature maps. Groups are as many as divide the channels, up to 8."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(channels, 8), channels)
    return nn.Identity()
