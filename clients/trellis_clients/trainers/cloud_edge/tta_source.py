"""The baseline of test-time adaptation: the source model, never adapted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from trellis.data.base import Batch
from trellis.registry import register
from trellis_clients.trainer import State, Turn
from trellis_clients.trainers.cloud_edge._edge import EdgeTrainer


@register(
    "trainers",
    "tta-source",
    summary="no adaptation: the source model answers the stream",
    paper="baseline of arXiv 2402.17316",
    takes=("image",),
    sends="uploads",
    payload="metrics alone",
    replies=("uploads",),
)
class TtaSource(EdgeTrainer):
    """What every adaptation is compared with."""

    @torch.no_grad()
    def adapt(self, model: nn.Module, stream: Iterable[Batch], state: State, turn: Turn) -> Iterator[Tensor]:  # noqa: ARG002
        """Answer with the source's parameters and statistics."""
        model.eval()
        for batch in stream:
            self.work.forwards += len(batch)
            yield model(batch.x)
