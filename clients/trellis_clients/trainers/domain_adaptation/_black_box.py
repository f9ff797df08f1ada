"""A predictor that answers queries with class probabilities, and gives nothing else away."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trellis import experiment, registry, seeding
from trellis.errors import PluginError
from trellis.models import pretraining
from trellis.scenario import Component, validated
from trellis_clients.trainer import Task

SOURCE = "source-"
"""What the names of a data set's labelled source streams begin with."""

BlackBox = Callable[[Tensor], Tensor]
"""Images ``(n, ...)`` in, probabilities ``(n, classes)`` out, without a gradient."""


def trained_predictors(task: Task, model: Component, *, epochs: int, lr: float, smoothing: float) -> list[BlackBox]:
    """Train one predictor on each source stream of the data set and return them as functions.

    They stand for services that somebody else runs. A caller has neither their weights nor the data they learnt from.

    Raises:
        PluginError: the data set has no source stream, or no model has that name.
    """
    streams = {name: split for name, split in sorted(task.splits.items()) if name.startswith(SOURCE)}
    if not streams:
        raise PluginError(
            "dine-source",
            "the data set has no stream 'source-0' that a predictor could have learnt from; e.g. shifted-digits",
        )
    cls = registry.load("models", model.name)
    plugin = cls(validated(cls.Config, model.params))  # type: ignore[attr-defined]
    boxes = []
    for name, split in streams.items():
        with seeding.scoped(task.seed, "black-box", name), experiment.torch_threads(1):
            network = plugin.build(task.shape, task.num_classes, task.facts).to(task.device)
            pretraining.train(
                network, split, epochs=epochs, lr=lr, batch_size=32, seed=task.seed, name=name, smoothing=smoothing
            )
        boxes.append(_sealed(network))
    return boxes


def _sealed(network: nn.Module) -> BlackBox:
    def predict(images: Tensor) -> Tensor:
        with torch.no_grad():
            probabilities: Tensor = network(images).softmax(1)
        return probabilities

    return predict
