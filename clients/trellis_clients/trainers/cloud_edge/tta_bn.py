"""Prediction-time batch norm: normalise by the statistics of the batch that is being answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

from trellis.data.base import Batch
from trellis.models import adaptation
from trellis.registry import register
from trellis_clients.trainer import State, Turn
from trellis_clients.trainers.cloud_edge._edge import EdgeConfig, EdgeTrainer, moving_statistics


@register(
    "trainers",
    "tta-bn",
    summary="prediction-time batch norm, mixed with the source's statistics",
    paper="arXiv 2006.10963, arXiv 2006.16971",
    takes=("image",),
    sends="uploads",
)
class TtaBn(EdgeTrainer):
    """Nado et al. 2020; Schneider et al., NeurIPS 2020.

    With source statistics M and a batch of n images with m: ``N/(N+n) M + n/(N+n) m``, biased variances alike. Anew
    for every batch; nothing accumulates.
    """

    class Config(EdgeConfig):
        prior: float = Field(0.0, ge=0, description="N, images that the source's statistics count for; 0: batch only")

    @torch.no_grad()
    def adapt(self, model: nn.Module, stream: Iterable[Batch], state: State, turn: Turn) -> Iterator[Tensor]:  # noqa: ARG002
        """Answer each batch under its own mix of statistics."""
        model.eval()
        live = adaptation.statistics(model)
        source = {name: values.clone() for name, values in live.items()}
        for batch in stream:
            for name, values in source.items():
                live[name].copy_(values)
            self.work.forwards += len(batch)
            with moving_statistics(model, len(batch) / (self.config.prior + len(batch))):
                logits = model(batch.x)
            yield logits
