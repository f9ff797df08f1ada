"""T3A on a device: the classifier follows the features it is surest of."""

from __future__ import annotations

from trellis.registry import register
from trellis_clients.edge.adapters.t3a import T3A
from trellis_clients.trainers.cloud_edge._edge import EdgeConfig
from trellis_clients.trainers.cloud_edge._forward_only import ForwardOnlyTrainer


@register(
    "trainers",
    "tta-t3a",
    summary="T3A: rebuilds the linear head from confident features of the stream; forward only",
    paper="NeurIPS 2021",
    takes=("image",),
    sends="uploads",
    payload="metrics alone",
    replies=("uploads",),
)
class TtaT3a(ForwardOnlyTrainer):
    """Iwasawa and Matsuo, NeurIPS 2021. What it does, where it fails and what differs: ``edge.adapters.t3a.T3A``.

    The supports stay on the client; new global weights drop them.
    """

    adapter = "t3a"

    class Config(EdgeConfig, T3A.Config):
        """Those of the stream and of T3A."""
