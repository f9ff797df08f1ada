"""Models of the zoo, their statistics settled on some data, and their exports, each made once."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trellis import registry
from trellis_clients import batchnorm
from trellis_clients.edge.session import OnnxPredictor
from trellis_clients.export.describe import describe
from trellis_clients.export.graph import to_onnx
from trellis_clients.export.mixing import add_mixing
from trellis_clients.export.quantization import quantize
from trellis_clients.torch_predictor import TorchPredictor

GREY, COLOUR = (1, 16, 16), (3, 32, 32)
CLASSES = ("ant", "bee", "cat", "dog")

# name: (model, shape, parameters)
ZOO: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "linear": ("linear", (12,), {}),
    "mlp": ("mlp", (12,), {}),
    "cnn": ("small-cnn", GREY, {"norm": "none"}),
    "cnn-batch": ("small-cnn", GREY, {"norm": "batch"}),
    "cnn-relu6": ("small-cnn", GREY, {"norm": "batch"}),
    "cnn-group": ("small-cnn", GREY, {"norm": "group"}),
    "four-conv": ("four-conv", GREY, {"width": 8}),
    "resnet-batch": ("resnet", GREY, {"width": 8, "norm": "batch"}),
    "vit": ("vit", GREY, {"patch": 4}),
    "efficientnet": ("timm", COLOUR, {"model": "test_efficientnet"}),
    "deit": (
        "timm",
        COLOUR,
        {"model": "deit_tiny_patch16_224", "options": {"img_size": 32, "patch_size": 8, "depth": 2}},
    ),
}
LARGE: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "mobilenet-v2": ("timm", (3, 64, 64), {"model": "mobilenetv2_050"}),
    "mobilenet-v3": ("timm", (3, 64, 64), {"model": "mobilenetv3_small_050"}),
}
"""They take many seconds each to trace, so only slow tests have them."""

KNOWN = {**ZOO, **LARGE}
WITH_BATCH_NORM = ("cnn-batch", "cnn-relu6", "four-conv", "resnet-batch", "efficientnet")
TRANSFORMERS = ("vit", "deit")


def examples(name: str, n: int, seed: int = 0) -> np.ndarray:
    """Return ``n`` examples for a model of the zoo, not centred."""
    return np.random.default_rng(seed).normal(0.3, 1.2, size=(n, *KNOWN[name][1])).astype(np.float32)


def fresh(name: str) -> nn.Module:
    """Build a model whose batch norms have seen data and whose scales and shifts are not 1 and 0."""
    model, shape, params = KNOWN[name]
    cls = registry.load("models", model)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        built = cls(cls.Config.model_validate(params)).build(shape, len(CLASSES), {})
        if name == "cnn-relu6":
            built.body[2] = built.body[6] = nn.ReLU6()
        for layer in built.modules():
            if isinstance(layer, _BatchNorm | nn.LayerNorm | nn.GroupNorm):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.2)
        batchnorm.recalibrate(built, [torch.from_numpy(examples(name, 64, seed=9))])
    return built.eval()


@cache
def graph(name: str) -> onnx.ModelProto:
    return to_onnx(fresh(name), KNOWN[name][1])


@cache
def blob(name: str, precision: str = "none") -> bytes:
    """Return a model file, as the export writes it."""
    proto, ranges = graph(name), None
    if precision == "int8":
        proto, ranges = quantize(proto, examples(name, 64, seed=1))
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    add_mixing(proto)
    describe(proto, fresh(name), CLASSES, KNOWN[name][1], ranges)
    return proto.SerializeToString()


def served(name: str, precision: str = "none") -> OnnxPredictor:
    return OnnxPredictor(blob(name, precision))


def reference(name: str) -> TorchPredictor:
    return TorchPredictor(fresh(name), CLASSES, KNOWN[name][1])
