"""MOON: local training whose features stay near the global model's and away from the client's own last ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.data.base import Batch, ClientData
from trellis.errors import PluginError
from trellis.registry import register
from trellis_clients.trainer import Metrics, NonNegative, State, Task, Trainer, TrainerConfig, Turn

PREVIOUS = "previous"
"""Key of a client's state: the shared arrays of the model as its last turn left them."""


@register(
    "trainers",
    "moon",
    paper="Li, He, Song, Model-Contrastive Federated Learning, CVPR 2021",
    takes=("image", "vector", "tokens", "series", "points"),
    sends="weights",
)
class Moon(Trainer):
    """MOON: adds mu · l_con to the cross-entropy (Algorithm 1, equations 3 and 4).

    l_con = -log( exp(sim(z, z_glob) / tau) / (exp(sim(z, z_glob) / tau) + exp(sim(z, z_prev) / tau)) ), with cosine
    similarity, averaged over the batch. z are the features of the model in training, z_glob those of the received
    global model, z_prev those of the model as this client's last turn left it, which it keeps in its private state.
    On a client's first turn there is no such model and l_con is 0, as in the authors' code.

    In the paper z is what enters the output layer, behind a projection head of two layers that MOON adds to the
    network. Here z is what enters the scenario's model's own head, and no layer is added, so that the same model
    can be compared under other trainers. Where those features follow a ReLU, similarities lie in [0, 1].
    """

    class Config(TrainerConfig):
        mu: NonNegative = Field(1.0, description="weight of the contrastive loss; the paper tunes 0.1, 1, 5, 10")
        temperature: Annotated[float, Field(gt=0)] = 0.5

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task)
        # One turn's two frozen models. A replay of bare steps uses those of the turn before, at the same cost.
        self.anchor: nn.Module | None = None
        self.previous: nn.Module | None = None

    def build(self) -> nn.Module:
        model = super().build()
        if not callable(getattr(model, "features", None)) or not isinstance(getattr(model, "head", None), nn.Module):
            raise PluginError(
                "model-head",
                f"trainer 'moon' compares features: {type(model).__name__} has no features(x) and head",
            )
        return model

    def fit(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        self.anchor = self._frozen(model, turn.received["arrays"])
        self.previous = self._frozen(model, state[PREVIOUS]) if PREVIOUS in state else None
        metrics = super().fit(model, data, state, turn)
        state[PREVIOUS] = {name: values.detach().clone() for name, values in self.shared(model).items()}
        return metrics

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:  # noqa: ARG002
        features: Tensor = model.features(batch.x)  # type: ignore[operator]
        loss: Tensor = F.cross_entropy(model.head(features), batch.y)  # type: ignore[operator]
        if self.anchor is None or self.previous is None or not self.config.mu:
            return loss
        with torch.no_grad():
            near: Tensor = self.anchor.features(batch.x)  # type: ignore[operator]
            far: Tensor = self.previous.features(batch.x)  # type: ignore[operator]
        mu: float = self.config.mu
        return loss + mu * contrast(features, near, far, self.config.temperature)

    def _frozen(self, model: nn.Module, arrays: Mapping[str, Tensor]) -> nn.Module:
        """Return a copy of the model with the given shared arrays, in evaluation mode and without gradients."""
        twin = copy.deepcopy(model).eval().requires_grad_(False)
        self.load_shared(twin, arrays)
        return twin


def contrast(z: Tensor, near: Tensor, far: Tensor, temperature: float) -> Tensor:
    """Return the model-contrastive loss (equation 3), the mean over a batch of features ``(n, D)``."""
    similarities = torch.stack([F.cosine_similarity(z, near), F.cosine_similarity(z, far)], dim=1) / temperature
    return F.cross_entropy(similarities, torch.zeros(len(z), dtype=torch.int64, device=z.device))
