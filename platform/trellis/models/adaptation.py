"""What edge and cloud agree on when a model is adapted to unlabeled data: what may change, and how sure it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
"""Layers whose scale and shift are adapted."""


def affine(model: nn.Module) -> dict[str, Tensor]:
    """Return scale and shift of every normalisation layer: live tensors by their names in the state dict."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, layer in model.named_modules()
        if isinstance(layer, NORMS)
        for name, parameter in layer.named_parameters(recurse=False)
    }


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running mean and variance of every batch-norm layer, live, by their names in the state dict."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
        for name, buffer in layer.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }


def train_only_affine(model: nn.Module) -> nn.Module:
    """Freeze everything but the normalisation layers' scale and shift. Returns the model."""
    chosen = {id(parameter) for parameter in affine(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return model


def entropy(logits: Tensor) -> Tensor:
    """Return the Shannon entropy in nats of the softmax of logits ``(n, classes)``; shape ``(n,)``."""
    log = torch.log_softmax(logits, 1)
    return -(log.exp() * log).sum(1)
