"""A model that fits the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from trellis.models._base import Plain, Shape
from trellis.models.zoo.mlp import Mlp
from trellis.models.zoo.small_cnn import SmallCnn
from trellis.registry import register
from trellis.scenario import Strict


@register("models", "auto", summary="small-cnn for images of 8 pixels and more, mlp otherwise")
class Auto(Plain):
    """For first steps and tests: it has no knobs, and what it picks depends on the shape of an example alone."""

    class Config(Strict):
        pass

    config: Config

    def build(self, shape: Shape, num_classes: int, facts: Mapping[str, Any]) -> nn.Module:
        if len(shape) == 3 and min(shape[1:]) >= 8:
            return SmallCnn(SmallCnn.Config.model_validate({})).build(shape, num_classes, facts)
        return Mlp(Mlp.Config.model_validate({})).build(shape, num_classes, facts)
