"""What edge and cloud agree on when a model is adapted to unlabeled data: what may change, and how sure it is."""

from __future__ import annotations

import hashlib
import sys

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


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256, in hexadecimal, of a model's floating-point weights and statistics.

    Of names, types, shapes and little-endian values in the order of names, so that the same weights have the same
    digest on every device, whichever way they came there. Counters (``num_batches_tracked``) do not enter: they change
    no prediction.
    """
    sha = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        if values.is_floating_point():
            plain = values.detach().cpu().contiguous()
            raw = plain.reshape(-1).view(torch.uint8).numpy().reshape(-1, plain.element_size())
            sha.update(f"{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
            sha.update((raw if sys.byteorder == "little" else raw[:, ::-1]).tobytes())
    return sha.hexdigest()


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
