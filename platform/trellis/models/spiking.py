"""Leaky integrate-and-fire neurons, step by step, with surrogate gradients.

A network of these is run one time step after another; between steps its neurons remember their membrane potential, an
attribute and not a buffer, as it belongs to the batch at hand and to nobody's model. ``reset`` before every batch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

Surrogate = Literal["triangle", "rectangle", "sigmoid"]
SLOPE = 4.0
"""Of the sigmoid whose derivative stands in for that of the step."""


def surrogate_derivative(u: Tensor, kind: Surrogate) -> Tensor:
    """Return what stands in for the step's derivative at potentials ``u`` over the threshold. Each integrates to 1."""
    if kind == "triangle":
        return (1 - u.abs()).clamp(min=0)
    if kind == "rectangle":
        return (u.abs() <= 0.5).to(u.dtype)
    s = torch.sigmoid(SLOPE * u)
    return SLOPE * s * (1 - s)


class Spike(torch.autograd.Function):
    """1 where the potential has reached the threshold, else 0; backward, the surrogate."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, kind: Surrogate) -> Tensor:
        ctx.save_for_backward(u)
        ctx.kind = kind
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return gradient * surrogate_derivative(u, ctx.kind), None


class Lif(nn.Module):
    """Leaky integrate-and-fire neurons with a soft reset and threshold 1.

    v[t] = (1 - 1/tau) v_post[t-1] + x[t]; s[t] = 1 if v[t] >= 1 else 0; v_post[t] = v[t] - s[t]; v_post[-1] = 0.

    Args:
        tau: time constant; at 1 nothing is remembered.
        surrogate: derivative of the spike.

    Attributes:
        through_time: whether gradients pass from a step's potential to the step before.
    """

    def __init__(self, tau: float = 1.1, surrogate: Surrogate = "triangle") -> None:
        super().__init__()
        self.leak = 1 - 1 / tau
        self.surrogate = surrogate
        self.through_time = True
        self.rest: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Take one step's input, of any shape; return its spikes."""
        v = x
        if self.rest is not None:
            v = x + self.leak * (self.rest if self.through_time else self.rest.detach())
        spikes: Tensor = Spike.apply(v - 1, self.surrogate)  # type: ignore[no-untyped-call]
        self.rest = v - spikes
        return spikes


def neurons(model: nn.Module) -> list[Lif]:
    """Return a network's spiking layers."""
    return [module for module in model.modules() if isinstance(module, Lif)]


def reset(model: nn.Module) -> None:
    """Let all neurons forget; before every batch, or its examples would go on from other examples' potentials."""
    for layer in neurons(model):
        layer.rest = None


def through_time(model: nn.Module, on: bool) -> None:
    """Let gradients pass from step to step, or cut them there. What the network computes is the same."""
    for layer in neurons(model):
        layer.through_time = on
