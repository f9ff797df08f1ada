"""A trainer that does nothing, so that what a round costs beside the clients' own work can be seen."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import nn

from trellis.data.base import ClientData
from trellis.registry import register
from trellis_clients.trainer import Metrics, State, Trainer, TrainerConfig, Turn


@register("trainers", "null", summary="returns the weights it was sent")
class Null(Trainer):
    """One linear layer of ``width`` times ``width`` weights, sent back as they came."""

    class Config(TrainerConfig):
        width: Annotated[int, Field(ge=1)] = 16

    config: Any

    def build(self) -> nn.Module:
        return nn.Linear(self.config.width, self.config.width)

    def fit(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:  # noqa: ARG002
        return {"loss": 0.0}
