"""FOA on a device: prompts by evolution, and a shift of the last activation."""

from __future__ import annotations

from typing import Any

from trellis import seeding
from trellis.registry import register
from trellis_clients.edge.adapters.foa import FoaOptions
from trellis_clients.trainers.cloud_edge._edge import EdgeConfig
from trellis_clients.trainers.cloud_edge._forward_only import ForwardOnlyTrainer


@register(
    "trainers",
    "tta-foa",
    summary="FOA: evolves a transformer's prompts by CMA-ES and shifts its last activation; forward only",
    paper="arXiv 2404.01650",
    takes=("image",),
    sends="uploads",
    payload="metrics alone",
    replies=("uploads",),
)
class TtaFoa(ForwardOnlyTrainer):
    """Niu et al., ICML 2024. What it does, where it fails and what differs: ``edge.adapters.foa.Foa``.

    Search, carried prompt, running mean and the source's statistics stay on the client. The statistics are measured on
    32 of its clean training images; new global weights drop all of it. Search states must not be averaged, and are not
    sent.
    """

    adapter = "foa"

    class Config(EdgeConfig, FoaOptions):
        """Those of the stream and of FOA. The seed is the run's and the client's."""

    def options(self, client: int) -> dict[str, Any]:
        """Return the options with a seed of this run's and this client's own."""
        return {**super().options(client), "seed": seeding.derive(self.task.seed, "foa", client)}
