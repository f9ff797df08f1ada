"""The four-convolution network of the few-shot literature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from trellis.models._base import Classifier, Plain, Shape, image_shape
from trellis.registry import register
from trellis.scenario import Strict


class FourConvClassifier(Classifier):
    """Four blocks of 3x3 convolution, batch norm, ReLU and 2x2 max-pooling; the flattened result is the embedding."""

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int) -> None:
        super().__init__()
        channels, height, side = shape
        blocks: list[nn.Module] = []
        for _ in range(4):
            blocks += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        self.body = nn.Sequential(*blocks, nn.Flatten())
        self.head = nn.Linear(width * (height >> 4) * (side >> 4), classes)

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        return features


@register("models", "four-conv", summary="four convolutional blocks, the encoder of prototypical networks")
class FourConv(Plain):
    """Snell, Swersky and Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017, section 3.1.

    With 64 channels an image of 28x28 pixels becomes 64 numbers, one of 84x84 becomes 1,600.
    """

    class Config(Strict):
        width: int = Field(64, ge=1, description="channels of every block")

    config: Config

    def build(self, shape: Shape, num_classes: int, facts: Mapping[str, Any]) -> nn.Module:
        del facts
        return FourConvClassifier(image_shape(shape, "four-conv", 16), num_classes, self.config.width)
