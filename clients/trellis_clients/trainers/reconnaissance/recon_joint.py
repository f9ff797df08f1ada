"""Training on every image that anybody has ever seen: the upper bound, which keeps nothing on the clients."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from trellis.data.base import Split
from trellis.registry import register
from trellis_clients.trainer import Metrics, Turn
from trellis_clients.trainers.reconnaissance._recon import EXEMPLARS, Recon, ReconConfig, ReconModel, examples


@register(
    "trainers",
    "recon-joint",
    paper="Hendryx et al., Federated Reconnaissance: Efficient, Distributed, Class-Incremental Learning, 2021",
    takes=("image", "vector"),
    sends="missions",
    payload="prototypes, all images",
    replies=("evidence", "exemplars"),
    strategies=("reconnaissance",),
)
class ReconJoint(Recon):
    """Clients send all their images, and after every mission the cloud trains on all it has, base classes included.

    Epochs draw as many examples of every class on average (by weights, with replacement), as there are a dozen times
    more of a base class than of one seen on one mission. Training goes on from the model at hand rather than from
    scratch.
    """

    class Config(ReconConfig):
        joint_epochs: Annotated[int, Field(ge=1)] = Field(2, description="passes over all images after every mission")

    config: Config
    uploads = (EXEMPLARS,)

    def learn(self, model: ReconModel, seen: Split, turn: Turn) -> Metrics:  # noqa: ARG002
        turn.reply[EXEMPLARS] = examples(seen)
        return {}

    def consolidate(self, model: ReconModel, pool: Split, turn: Turn) -> tuple[Metrics, Tensor | None]:
        """Train on the pool, drawn evenly by class; keep all of it."""
        y = pool.fields["y"][pool.rows].cpu()  # where the turn's generator is
        if turn.round == 1:
            return {}, None  # the base classes alone have just been learnt
        weights = 1 / torch.bincount(y).double()[y]
        drawn = torch.multinomial(weights, len(y), replacement=True, generator=turn.generator)
        optimizer = torch.optim.Adam(model.net.parameters(), lr=self.config.base_lr)
        balanced = pool.subset(drawn.to(pool.rows.device))
        return self.supervised(model, balanced, turn, optimizer, model.known, self.config.joint_epochs), None
