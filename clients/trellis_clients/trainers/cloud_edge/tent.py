"""Tent: minimise the entropy of the model's own predictions, on the device."""

from __future__ import annotations

from torch import Tensor, nn

from trellis.models import adaptation
from trellis.registry import register
from trellis_clients.trainer import State
from trellis_clients.trainers.cloud_edge._on_device import OnDeviceTrainer


@register(
    "trainers",
    "tent",
    summary="Tent: entropy minimisation on the device, every sample, by backpropagation",
    paper="arXiv 2006.10726",
    takes=("image",),
    sends="uploads",
    payload="metrics alone",
    replies=("uploads",),
)
class Tent(OnDeviceTrainer):
    """Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021."""

    def objective(self, model: nn.Module, logits: Tensor, state: State) -> tuple[Tensor | None, int]:  # noqa: ARG002
        """Return the mean entropy of the batch."""
        return adaptation.entropy(logits).mean(), len(logits)
