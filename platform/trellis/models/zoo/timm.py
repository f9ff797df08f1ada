"""Any model of timm by name."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from trellis.errors import DataError, PluginError, nearest
from trellis.models import torchvision_shim
from trellis.models._base import Classifier, Plain, Shape, image_shape
from trellis.registry import register
from trellis.scenario import Strict


class TimmClassifier(Classifier):
    """A timm model without its classifier, and a linear head on its pooled features."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        return features


@register("models", "timm", summary="any model of timm by name")
class Timm(Plain):
    """A model of the timm library (https://github.com/huggingface/pytorch-image-models), which must be installed.

    Nothing is ever downloaded: weights start at random or come from a local safetensors file of timm's own layout,
    whose classifier is left out.
    """

    class Config(Strict):
        model: str = Field(pattern=r"^[A-Za-z0-9_]+$", description="timm's name without a tag, e.g. 'resnet18'")
        checkpoint: str | None = Field(None, description="a local .safetensors file; relative to the working folder")
        options: dict[str, Any] = Field({}, description="further arguments of the model, e.g. {img_size: 32}")

    config: Config

    def build(self, shape: Shape, num_classes: int, facts: Mapping[str, Any]) -> nn.Module:
        del facts
        channels, _, _ = image_shape(shape, "timm", 1)
        timm = _timm()
        name = self.config.model
        if not timm.is_model(name):
            raise PluginError("model-unknown", f"model.model: timm has no {name!r}.{nearest(name, timm.list_models())}")
        try:
            body = timm.create_model(name, pretrained=False, in_chans=channels, num_classes=0, **self.config.options)
        except TypeError as error:
            raise PluginError("model-options", f"model.options: {name!r} does not take them: {error}") from None
        if self.config.checkpoint is not None:
            _load(body, Path(self.config.checkpoint))
        # With a hidden layer before the classifier (MobileNetV3), the pooled features are that layer's.
        width = getattr(body, "head_hidden_size", None) or body.num_features
        return TimmClassifier(body, int(width), num_classes)


def _timm() -> Any:
    try:
        torchvision_shim.make_importable()
        import timm
    except ImportError as error:
        raise PluginError("model-timm", f"model 'timm' needs the packages timm and torchvision: {error}") from None
    return timm


def _load(body: Any, path: Path) -> None:
    """Load weights into a model without classifier; the file may hold a classifier's too."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise DataError("model-checkpoint", f"model.checkpoint: nothing is at {path}")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(
            "model-checkpoint", f"model.checkpoint: {path} is not readable as safetensors: {error}"
        ) from None
    classifier = body.default_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
    weights = {key: value for key, value in weights.items() if not key.startswith(heads)} if heads else weights
    try:
        body.load_state_dict(weights)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error).partition("\n")[2] or str(error), 200)
        raise DataError("model-checkpoint", f"model.checkpoint: {path} does not fit the model: {reason}") from None
