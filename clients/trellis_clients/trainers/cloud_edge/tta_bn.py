"""Prediction-time batch norm on a device: normalise by the statistics of the batch that is being answered."""

from __future__ import annotations

from pydantic import Field

from trellis.registry import register
from trellis_clients.edge.adapters.prediction_bn import PredictionBnOptions
from trellis_clients.trainers.cloud_edge._edge import EdgeConfig
from trellis_clients.trainers.cloud_edge._forward_only import ForwardOnlyTrainer


@register(
    "trainers",
    "tta-bn",
    summary="prediction-time batch norm, mixed with the source's statistics; forward only",
    paper="arXiv 2006.10963, arXiv 2006.16971",
    takes=("image",),
    sends="uploads",
    payload="metrics alone",
    replies=("uploads",),
)
class TtaBn(ForwardOnlyTrainer):
    """Nado et al. 2020; Schneider et al., NeurIPS 2020. What it does and where it fails:
    ``edge.adapters.prediction_bn.PredictionBatchNorm``.

    Nothing is kept from batch to batch but, with ``moving``, the statistics; they stay on the client.
    """

    adapter = "prediction-bn"

    class Config(EdgeConfig, PredictionBnOptions):
        """Those of the stream and of the adapter, with prior 0: the batch's statistics alone (Nado et al.)."""

        prior: float | None = Field(
            0.0, ge=0, description="N, images that the source's statistics count for; 0: batch only; null: source only"
        )
