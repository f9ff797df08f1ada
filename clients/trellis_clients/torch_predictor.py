"""A torch model as a predictor: forward only, no gradient, and numbers that equal those of its ONNX export."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trellis.errors import PluginError
from trellis.models import adaptation
from trellis.models.zoo.timm import TimmClassifier
from trellis.models.zoo.vit import VisionTransformer
from trellis_clients.edge.predictor import Array, Prediction, checked, checked_affine


class Forward(nn.Module):
    """A classifier with everything an adapter looks at among its outputs. It holds the model, it does not copy it.

    Attributes:
        width: D of a token; None where the model takes no prompts.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        head = getattr(model, "head", None)
        if not isinstance(head, nn.Linear) or not callable(getattr(model, "features", None)):
            raise PluginError(
                "model-head",
                f"{type(model).__name__} has no features(x) and linear head, which a predictor looks at",
            )
        self.model = model
        self.width: int | None = None
        if takes_prompts(model):
            self.width = head.in_features

    def forward(
        self, x: Tensor, prompts: Tensor | None = None, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Return logits, features and, of a transformer, activations; see ``Prediction``."""
        model: Any = self.model
        if self.width is None:
            features = model.features(x)
            return model.head(features if shift is None else features + shift), features
        features, activations = encode(model, x, prompts)
        return model.head(features if shift is None else features + shift), features, activations


def takes_prompts(model: nn.Module) -> bool:
    """Whether a model is a vision transformer that reads its answer from a class token, alone before the patches."""
    if isinstance(model, VisionTransformer):
        return True
    # timm is optional, and where it was not imported no model is one of its.
    timm = sys.modules.get("timm.models.vision_transformer")
    body = getattr(model, "body", None)
    return (
        timm is not None
        and isinstance(model, TimmClassifier)
        and isinstance(body, timm.VisionTransformer)
        and body.global_pool == "token"
        and body.cls_token is not None
        and body.num_prefix_tokens == 1
        and isinstance(body.norm, nn.LayerNorm)
    )


def encode(model: Any, x: Tensor, prompts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run a vision transformer with prompts behind its class token.

    Returns:
        features ``(n, D)`` and activations ``(n, L, D)``.
    """
    body: Any = model.body if isinstance(model, TimmClassifier) else model
    tokens = (
        body.norm_pre(body.patch_drop(body._pos_embed(body.patch_embed(x)))) if body is not model else body.embed(x)
    )
    if prompts is not None:
        tokens = torch.cat([tokens[:, :1], prompts.expand(tokens.shape[0], -1, -1), tokens[:, 1:]], 1)
    blocks = list(body.blocks)
    activations = []
    for number, block in enumerate(blocks):
        tokens = block(tokens)
        follower = blocks[number + 1].norm1 if number + 1 < len(blocks) else body.norm
        activations.append(follower(tokens[:, 0]))
    last = activations[-1]
    features = last if body is model else body.forward_head(last[:, None])
    return features, torch.stack(activations, 1)


class TorchPredictor:
    """A classifier of the zoo or of timm as a ``Predictor``.

    It holds the model, so ``load_affine`` writes to it and later changes of the model show. Calls may come from
    several threads; they are served one after another.

    Args:
        model: with ``features(x)`` and a linear ``head``. It is run in evaluation mode and given back as it was.
        classes: names in the order of the logits.
        shape: of one example.

    Raises:
        PluginError: the model has no features or no linear head.
    """

    def __init__(self, model: nn.Module, classes: Sequence[str], shape: Sequence[int]) -> None:
        self.model = model
        self.classes = tuple(classes)
        self.shape = tuple(shape)
        self._forward = Forward(model)
        self._norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
        self._lock = threading.Lock()

    @property
    def head(self) -> tuple[Array, Array]:
        head: Any = self.model.head
        bias = torch.zeros(head.out_features) if head.bias is None else head.bias
        return _numpy(head.weight), _numpy(bias)

    @property
    def prompt_width(self) -> int | None:
        return self._forward.width

    @property
    def has_batch_norm(self) -> bool:
        return any(layer.running_mean is not None for layer in self._norms)

    def __call__(
        self,
        x: NDArray[Any],
        *,
        prior: float | None = None,
        prompts: NDArray[Any] | None = None,
        shift: NDArray[Any] | None = None,
    ) -> Prediction:
        inputs = checked(self, x, prior, prompts, shift)
        device = next(self.model.parameters()).device
        given = [
            None if array is None else torch.from_numpy(array).to(device)
            for array in (inputs.x, inputs.prompts, inputs.shift)
        ]
        with self._lock, torch.no_grad(), evaluating(self.model), mixing(self._norms, inputs.prior, len(inputs.x)):
            outputs = self._forward(*given)
        logits, features, *activations = (_numpy(output) for output in outputs)
        return Prediction(logits, features, activations[0] if activations else None)

    def affine(self) -> dict[str, Array]:
        return {name: _numpy(tensor) for name, tensor in adaptation.affine(self.model).items()}

    def load_affine(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        live = adaptation.affine(self.model)
        new = checked_affine(arrays, live)
        with self._lock, torch.no_grad():
            for name, values in new.items():
                live[name].copy_(torch.from_numpy(values))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while, and every part of it back into its own."""
    modes = [(module, module.training) for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def mixing(layers: Sequence[_BatchNorm], prior: float | None, n: int) -> Iterator[None]:
    """Let batch norms in evaluation mode normalise a batch of ``n`` by ``(prior * source + n * batch) / (prior + n)``.

    The layer's own forward reads the statistics, so layers with an activation inside (timm's) are right as well.
    Layers that track no statistics always use the batch's. Source statistics stay as they are.
    """
    if prior is None:
        yield
        return
    weight = prior / (prior + n)
    kept: dict[_BatchNorm, tuple[Tensor | None, Tensor | None]] = {}

    def swap(layer: Any, args: tuple[Tensor, ...]) -> None:
        (x,) = args
        kept[layer] = (layer.running_mean, layer.running_var)
        var, mean = moments(x)
        layer.running_mean = weight * layer.running_mean + (1 - weight) * mean
        layer.running_var = weight * layer.running_var + (1 - weight) * var

    def restore(layer: Any, *_: Any) -> None:
        if layer in kept:
            layer.running_mean, layer.running_var = kept.pop(layer)

    handles = []
    for layer in layers:
        if layer.running_mean is not None:
            handles.append(layer.register_forward_pre_hook(swap))
            handles.append(layer.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in list(kept):
            restore(layer)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the biased variance and the mean of every channel, ``(C,)``, of ``(n, C, ...)``.

    ``torch.var_mean`` over these dimensions takes ten times as long on a CPU, more than the network around it.
    """
    maps = x.flatten(2) if x.ndim > 2 else x[..., None]
    mean = maps.mean(2).mean(0)
    return (maps - mean[:, None]).square_().mean(2).mean(0), mean


def _numpy(tensor: Tensor) -> Array:
    """Copy a tensor out of torch."""
    values: Array = tensor.detach().cpu().numpy().astype(np.float32, copy=True)
    return values
