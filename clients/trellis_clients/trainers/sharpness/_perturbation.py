"""A loss at other weights than the model's: the ascent of SAM and ESAM, and passes that leave no trace.

The model's weights are never written to. A loss at w + eps is computed with stand-ins for the weights, whose derivative
by w is the identity; so backward gives the gradient at w + eps, and there is nothing to restore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trellis_clients import batchnorm

Weights = Mapping[str, Tensor]

TINY = 1e-12
"""Added to the gradient's norm, as in SAM's own code; ESAM's has 1e-7 there, which only matters at a norm near that."""


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def ascent(loss: Tensor, weights: Weights, radius: float) -> dict[str, Tensor]:
    """Return eps = radius · g / ‖g‖ by name, g the gradient of a scalar loss by ``weights``, its norm over all of them.

    Constant: nothing is differentiated through it. Weights that the loss does not depend on have no entry.
    """
    if not weights:
        return {}
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    gradients = {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}
    scale = radius / (nn.utils.get_total_norm(gradients.values()) + TINY)
    return {name: scale * gradient for name, gradient in gradients.items()}


def moved(weights: Weights, shift: Weights) -> dict[str, Tensor]:
    """Return w + eps for every weight that has an eps, differentiable by w."""
    return {name: weights[name] + eps for name, eps in shift.items()}


def at(model: nn.Module, weights: Weights, function: Callable[[nn.Module], Tensor]) -> Tensor:
    """Return ``function(model)`` as it is with other ``weights``, differentiable by these.

    Batch norm normalises as the model's mode says, but running statistics stay as they are: in training they have been
    updated by the pass at the model's own weights, and must not be again.
    """
    with untouched_statistics(model):
        held = {f"model.{name}": values for name, values in weights.items()}
        result: Tensor = functional_call(_Held(model, function), held, ())
    return result


@contextmanager
def untouched_statistics(model: nn.Module) -> Iterator[None]:
    """Leave batch norm's running statistics and counters alone; normalisation itself does not change."""
    layers = [layer for _, layer in batchnorm.layers(model) if layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """Put torch's global generators back afterwards, so that the next pass has the same dropout masks."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        yield


class _Held(nn.Module):
    """A function of a model as a module, so that torch can exchange the model's weights underneath it."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self) -> Tensor:
        return self.function(self.model)
