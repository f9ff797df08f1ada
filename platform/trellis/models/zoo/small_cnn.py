"""A small convolutional network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from trellis.models._base import Classifier, Norm, Plain, Shape, image_shape, norm_layer
from trellis.registry import register
from trellis.scenario import Strict


class SmallCnnClassifier(Classifier):
    """Blocks of 3x3 convolution, normalisation, ReLU and 2x2 max-pooling, each twice as wide; one hidden layer."""

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, blocks: int, hidden: int, norm: Norm):
        super().__init__()
        channels, height, side = shape
        layers: list[nn.Module] = []
        for block in range(blocks):
            out = width * 2**block
            # A bias before a normalisation is subtracted again.
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=norm == "none"), norm_layer(norm, out)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            channels = out
        pixels = (height >> blocks) * (side >> blocks)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * pixels, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, classes)

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        return features


@register("models", "small-cnn", summary="two or three convolutional blocks and a hidden layer")
class SmallCnn(Plain):
    """For images of 8 pixels a side and more."""

    class Config(Strict):
        width: int = Field(16, ge=1, description="channels of the first block; they double from block to block")
        blocks: Literal[2, 3] = 2
        hidden: int = Field(64, ge=1, description="units of the hidden layer, which are the features")
        norm: Norm = Field("none", description="batch statistics are averaged over clients like weights")

    config: Config

    def build(self, shape: Shape, num_classes: int, facts: Mapping[str, Any]) -> nn.Module:
        del facts
        config, image = self.config, image_shape(shape, "small-cnn", 8)
        return SmallCnnClassifier(image, num_classes, config.width, config.blocks, config.hidden, config.norm)
