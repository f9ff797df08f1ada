"""A multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from trellis.models._base import Classifier, Plain, Shape
from trellis.registry import register
from trellis.scenario import Strict


class MlpClassifier(Classifier):
    """Linear layers with ReLU on the flattened example; the features are the last hidden layer."""

    def __init__(self, inputs: int, hidden: Sequence[int], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        return features


@register("models", "mlp", summary="a multilayer perceptron with ReLU")
class Mlp(Plain):
    """Takes examples of any shape."""

    class Config(Strict):
        hidden: list[Annotated[int, Field(ge=1)]] = Field([64], min_length=1, description="units of each hidden layer")

    config: Config

    def build(self, shape: Shape, num_classes: int, facts: Mapping[str, Any]) -> nn.Module:
        del facts
        return MlpClassifier(math.prod(shape), self.config.hidden, num_classes)
