"""CEMA, the edge: answer, measure entropies, upload the few samples that are both reliable and informative."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trellis.data.base import Batch
from trellis.models import adaptation
from trellis.registry import register
from trellis_clients.trainer import State, Turn
from trellis_clients.trainers.cloud_edge._edge import EdgeConfig, EdgeTrainer, moving_statistics
from trellis_clients.trainers.cloud_edge._selection import Budget, Thresholds

STATISTICS = "statistics"
SELECTION = "selection"


@register(
    "trainers",
    "cema",
    summary="CEMA's edge: forward passes only, uploads of samples that are reliable and informative",
    paper="arXiv 2402.17316",
    takes=("image",),
    sends="uploads",
    payload="selected images",
    replies=("uploads",),
)
class Cema(EdgeTrainer):
    """Chen et al., "Towards Robust and Efficient Cloud-Edge Elastic Model Adaptation", ICLR 2024.

    No gradient is ever taken here. Entropies are in nats. Batch-norm statistics follow the stream by a running
    mean, which takes forward passes only and sends nothing.
    """

    class Config(EdgeConfig):
        filter: bool = Field(True, description="False uploads every sample")
        e_max: float = Field(0.4, ge=0, description="unreliable from here on, at first; in units of ln C")
        e_min: float = Field(0.02, ge=0, description="low-informative up to here; in units of ln C")
        decay: float = Field(1.0, gt=0, le=1, description="lambda of the dynamic threshold; compounds every batch")
        statistics: Literal["edge", "cloud", "source"] = Field(
            "edge",
            description="batch-norm statistics: a running mean over the edge's own stream; those of the cloud's copy, "
            "sent along with the affine parameters; the source model's for ever",
        )
        momentum_statistics: float = Field(0.1, gt=0, le=1, description="rate of the running mean")
        budget_bytes_per_hour: float | None = Field(
            None, gt=0, description="of stream time; when it binds, the samples of lowest entropy go first"
        )

    def shared(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the affine parameters, with the running statistics if the edge takes the cloud's."""
        own = super().shared(model)
        return own | adaptation.statistics(model) if self.config.statistics == "cloud" else own

    @torch.no_grad()
    def adapt(self, model: nn.Module, stream: Iterable[Batch], state: State, turn: Turn) -> Iterator[Tensor]:  # noqa: ARG002
        """Answer each batch with the parameters received last, and pick what to upload."""
        c = self.config
        thresholds = Thresholds(self.task.num_classes, c.e_max, c.e_min, c.decay)
        if not c.filter:
            thresholds.high, thresholds.low = math.inf, -1.0
        budget = Budget(c.budget_bytes_per_hour)
        if SELECTION in state:
            thresholds.load_state(state[SELECTION]["thresholds"])
            budget.saved = state[SELECTION]["saved"]
        for name, values in state.get(STATISTICS, {}).items():
            adaptation.statistics(model)[name].copy_(values)
        sample_bytes = math.prod(self.task.shape) * (1 if c.upload == "uint8" else 4)
        model.eval()
        rate = c.momentum_statistics if c.statistics == "edge" else 0.0
        with moving_statistics(model, rate, started=c.statistics != "edge" or STATISTICS in state):
            for batch in stream:
                logits = model(batch.x)
                self.work.forwards += len(batch)
                entropies = adaptation.entropy(logits)
                kept = thresholds.keep(entropies).nonzero()[:, 0]
                kept = budget.afford(kept, entropies, sample_bytes, c.stream.batch_hours)
                self.work.uploads.append(batch.x[kept])
                yield logits
        state[SELECTION] = {"thresholds": thresholds.state(), "saved": budget.saved}
        if c.statistics == "edge":
            state[STATISTICS] = {name: v.clone() for name, v in adaptation.statistics(model).items()}
        self.work.extra["e-max"] = min(thresholds.e_max, math.log(self.task.num_classes))
