"""What happens to batch norm in a federation: averaged, kept local, or computed anew.

Averaging running statistics over clients with different label mixes describes no client's data; FedBN
(Li et al., ICLR 2021) keeps the layers local, and recalibration computes the statistics where they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def layers(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Return the batch-norm layers of a model with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def private_names(model: nn.Module, policy: str) -> set[str]:
    """Return the state-dict names that a policy keeps on the client.

    ``average`` keeps none, ``local`` keeps whole layers, ``recalibrate`` keeps statistics only.
    """
    if policy == "average":
        return set()
    names = set()
    for prefix, layer in layers(model):
        for name in layer.state_dict():
            if policy == "local" or name in STATISTICS:
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


@torch.no_grad()
def recalibrate(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Set the running statistics to the plain average over the given batches."""
    found = [layer for _, layer in layers(model)]
    momenta = [layer.momentum for layer in found]
    training = model.training
    for layer in found:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
    model.train()
    for x in inputs:
        model(x)
    for layer, momentum in zip(found, momenta, strict=True):
        layer.momentum = momentum
    model.train(training)


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Let no batch move the running statistics; layers in training mode still normalise by the batch's own.

    For forward passes on images that are not data: mixtures, augmented views.
    """
    found = [layer for _, layer in layers(model)]
    momenta = [layer.momentum for layer in found]
    for layer in found:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(found, momenta, strict=True):
            layer.momentum = momentum


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise by each batch's own statistics, leaving the running ones as they are.

    For evaluating in the cloud a model whose statistics live only on the clients.
    """
    found = [layer for _, layer in layers(model)]
    kept = [(layer.running_mean, layer.running_var) for layer in found]
    for layer in found:
        layer.running_mean = layer.running_var = None
    try:
        yield
    finally:
        for layer, (mean, var) in zip(found, kept, strict=True):
            layer.running_mean, layer.running_var = mean, var
