"""Multinomial logistic regression."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trellis.models._base import Classifier, Plain, Shape
from trellis.registry import register
from trellis.scenario import Strict


class LinearClassifier(Classifier):
    """One linear layer on the flattened example; the features are the example itself."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, classes)

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@register("models", "linear", summary="multinomial logistic regression")
class Linear(Plain):
    """A convex problem, for comparing methods where the optimum is known. Takes examples of any shape."""

    class Config(Strict):
        pass

    config: Config

    def build(self, shape: Shape, num_classes: int, facts: Mapping[str, Any]) -> nn.Module:
        del facts
        return LinearClassifier(math.prod(shape), num_classes)
