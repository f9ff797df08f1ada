"""What a model file says of itself, in ``metadata_props``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trellis.errors import TrellisError
from trellis.models import adaptation
from trellis_clients.edge.model_file import FORMAT, KEY
from trellis_clients.torch_predictor import takes_prompts


def describe(
    proto: onnx.ModelProto,
    model: nn.Module,
    classes: Sequence[str],
    shape: Sequence[int],
    ranges: Mapping[str, tuple[float, float]] | None,
    **more: Mapping[str, Any],
) -> None:
    """Write the metadata into a model file.

    Args:
        ranges: of batch norms' results; None where nothing is quantised.
        more: ``preprocessing``, ``source`` and ``quality``.
    """
    statistics = list(adaptation.statistics(model))
    affine = list(adaptation.affine(model))
    transformer = takes_prompts(model)
    head: Any = model.head
    width = head.in_features
    can = {
        "shift": True,
        "affine": bool(affine),
        "mixing": bool(statistics),
        "prompts": transformer,
        "activations": transformer,
    }
    said = {
        "classes": list(classes),
        "shape": list(shape),
        "features": width,
        "prompts": width if transformer else None,
        "norms": {
            name: "batch" if isinstance(layer, _BatchNorm) else "group" if isinstance(layer, nn.GroupNorm) else "layer"
            for name, layer in model.named_modules()
            if isinstance(layer, adaptation.NORMS)
        },
        "affine": affine,
        "statistics": statistics,
        "head": _head(proto),
        "can": [name for name, able in can.items() if able],
        "quantization": "none" if ranges is None else "int8",
        "ranges": {name: list(span) for name, span in (ranges or {}).items()},
        "weights": adaptation.weights_digest(model),
    }
    del proto.metadata_props[:]
    entries = {"format": FORMAT, "model": json.dumps(said), **{key: json.dumps(value) for key, value in more.items()}}
    for key, text in entries.items():
        proto.metadata_props.add(key=KEY + key, value=text)


def _head(proto: onnx.ModelProto) -> dict[str, str]:
    """Return the names of the initializers that hold the last layer, and of their step sizes where it is in int8."""
    held = {tensor.name for tensor in proto.graph.initializer}
    makers = {node.output[0]: node for node in proto.graph.node}
    last = makers["logits"]
    if last.op_type != "Gemm":
        raise TrellisError("export-head", f"the last layer became a {last.op_type}; expected a Gemm")
    names: dict[str, str] = {}
    # A bias of zeros is left out by the exporter.
    for part, name in zip(("weight", "bias"), last.input[1:], strict=False):
        if name in held:
            names[part] = name
        else:
            names[part], names[f"{part}_scale"] = makers[name].input[:2]
    return names
