"""FedProx: local training that is held near the global model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trellis.data.base import Batch
from trellis.registry import register
from trellis_clients.trainer import NonNegative, Trainer, TrainerConfig, Turn


@register(
    "trainers",
    "fedprox",
    paper="Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020",
    takes=("image", "vector", "tokens", "series", "points"),
    sends="weights",
)
class FedProx(Trainer):
    """FedProx: adds mu/2 · ‖w - w_t‖² to the local objective (Algorithm 2, equation 2).

    mu is the config's, unless the strategy sends ``proximal-mu``, as Flower's own FedProx does. The norm
    runs over trained parameters; batch-norm statistics have no gradient and take no part.
    """

    class Config(TrainerConfig):
        mu: NonNegative = 0.01

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:
        mu = float(turn.config.get("proximal-mu", self.config.mu))
        anchor = turn.received["arrays"]
        distance = torch.zeros((), device=self.task.device)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name in anchor:
                distance = distance + (parameter - anchor[name]).square().sum()
        return super().loss(model, batch, turn) + mu / 2 * distance
