"""A predictor that answers queries with class probabilities, and gives nothing else away."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from trellis import experiment, registry, seeding
from trellis.data.base import Split
from trellis.errors import PluginError, ScenarioError
from trellis.models import pretraining
from trellis.scenario import Component, explain, validated
from trellis_clients.trainer import Task

SOURCE = "source-"
"""What the names of a data set's labelled source streams begin with."""

BlackBox = Callable[[Tensor], Tensor]
"""Images ``(n, ...)`` in, probabilities ``(n, classes)`` out, without a gradient."""


def checked(model: Component, key: str) -> tuple[type, BaseModel]:
    """Return a predictor's model class and its validated ``Config``.

    Raises:
        PluginError: no model has that name.
        ScenarioError: a parameter is unknown or wrong; it is named as e.g. ``trainer.predictor.hidden``.
    """
    try:
        cls = registry.load("models", model.name)
    except PluginError as error:
        raise PluginError(error.code, f"{key}: {error.message}") from None
    config: type[BaseModel] = cls.Config  # type: ignore[attr-defined]
    try:
        return cls, validated(config, model.params)
    except ValidationError as error:
        raise ScenarioError("scenario-invalid", explain(error, config, key)) from None


def sources(task: Task) -> dict[str, Split]:
    """Return the labelled source streams of the data set, by name.

    Raises:
        PluginError: there is none.
    """
    streams = {name: split for name, split in sorted(task.splits.items()) if name.startswith(SOURCE)}
    if not streams:
        raise PluginError(
            "dine-source",
            "the data set has no stream 'source-0' that a predictor could have learnt from; e.g. shifted-digits",
        )
    return streams


def untrained(task: Task, model: Component, key: str) -> nn.Module:
    """Return a predictor's network with fresh weights from the surrounding random state.

    Raises:
        TrellisError: there is no such network, or none for the task's data.
    """
    cls, config = checked(model, key)
    network: nn.Module = cls(config).build(task.shape, task.num_classes, task.facts)
    return network.to(task.device)


def trained_predictors(
    task: Task, model: Component, key: str, *, epochs: int, lr: float, smoothing: float
) -> list[BlackBox]:
    """Train one predictor on each source stream of the data set and return them as functions.

    They stand for services that somebody else runs. A caller has neither their weights nor the data they learnt from.

    Raises:
        TrellisError: as ``sources`` and ``untrained`` say.
    """
    boxes = []
    for name, split in sources(task).items():
        with seeding.scoped(task.seed, "black-box", name), experiment.torch_threads(1):
            network = untrained(task, model, key)
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
