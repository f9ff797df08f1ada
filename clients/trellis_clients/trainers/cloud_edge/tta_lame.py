"""LAME on a device: neighbours within a batch agree."""

from __future__ import annotations

from trellis.registry import register
from trellis_clients.edge.adapters.lame import Lame
from trellis_clients.trainers.cloud_edge._edge import EdgeConfig
from trellis_clients.trainers.cloud_edge._forward_only import ForwardOnlyTrainer


@register(
    "trainers",
    "tta-lame",
    summary="LAME: makes neighbours in feature space agree; forward only, for streams of correlated labels",
    paper="arXiv 2201.05718",
    takes=("image",),
    sends="uploads",
    payload="metrics alone",
    replies=("uploads",),
)
class TtaLame(ForwardOnlyTrainer):
    """Boudiaf et al., CVPR 2022. What it does, where it fails and what differs: ``edge.adapters.lame.Lame``.

    Nothing is kept from batch to batch.
    """

    adapter = "lame"

    class Config(EdgeConfig, Lame.Config):
        """Those of the stream and of LAME."""
