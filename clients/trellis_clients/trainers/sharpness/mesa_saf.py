"""MESA, the memory-efficient SAF: hold the outputs near those of a moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trellis.data.base import Batch, ClientData, Split
from trellis.registry import register
from trellis_clients.trainer import Metrics, NonNegative, State, Task, Trainer, TrainerConfig, Turn
from trellis_clients.trainers.sharpness import _perturbation as perturbation
from trellis_clients.trainers.sharpness._trajectory import examples_an_epoch, trajectory_loss

EPOCHS, AVERAGE = "epochs", "average"
"""Keys of a client's state: how many epochs it has done, and, if it keeps it, its average."""


@register(
    "trainers",
    "mesa-saf",
    paper="Du et al., Sharpness-Aware Training for Free, NeurIPS 2022 (there: MESA)",
    takes=("image", "vector", "tokens", "series", "points"),
    sends="weights",
)
class MesaSaf(Trainer):
    """MESA (section 3.2): SAF's loss with the outputs of an average v of the weights as the past.

    In every step v <- beta · v + (1 - beta) · w; from the epoch after E_start, lambda times the mean over the batch of
    KL( softmax(v(x) / tau) || softmax(w(x) / tau) ) is added. One forward pass more than plain training, on the same
    batch. There is no factor tau². The model that is sent is w; v is never sent.

    v(x) is computed as the model in training computes it: the same dropout masks, batch norm by the batch's statistics,
    running ones untouched. So beta = 0 is plain training exactly.

    In a federation v starts anew from the received weights in every turn (``average: restart``): the past is then the
    global model and what the client has done since, and the term holds the client near what the others know. With
    ``average: keep`` it goes on from the client's last turn, in its private state, older the more rounds it sat out.
    E_start counts the client's own epochs over all its rounds. Defaults are the paper's for ImageNet; its beta averages
    over 2,000 steps, and v is then hardly more than the received weights. For turns of tens of steps use 0.9 to 0.99.

    Measured on digits under Dirichlet 0.1: top eigenvalue 0.85 of SGD's, accuracy the same; with four of ten clients a
    round 12 points more, as FedProx has too: docs/methods/sharpness.md.
    """

    class Config(TrainerConfig):
        weight: NonNegative = Field(0.8, description="lambda, of the trajectory loss")
        temperature: Annotated[float, Field(gt=0)] = Field(5.0, description="tau")
        decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.9995, description="beta, of the average of weights")
        start_epoch: Annotated[int, Field(ge=0)] = Field(5, description="E_start, the client's epochs without the loss")
        average: Literal["restart", "keep"] = Field("restart", description="the average from round to round")

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task)
        self.advance = get_ema_multi_avg_fn(config.decay)  # type: ignore[no-untyped-call]
        # One turn's average and epoch. A replay of bare steps uses those of the turn before, at the same cost.
        self.average: dict[str, Tensor] = {}
        self.epoch = 0

    def fit(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        self.epoch = state.get(EPOCHS, 0)
        self.average = state.get(AVERAGE, {})
        metrics = super().fit(model, data, state, turn)
        state[EPOCHS] = self.epoch
        if self.config.average == "keep":
            state[AVERAGE] = self.average
        return metrics

    def batches(self, split: Split, turn: Turn) -> Iterator[Batch]:
        seen, epoch = 0, examples_an_epoch(split, self.config)
        for batch in super().batches(split, turn):
            self.epoch += seen % epoch == 0
            seen += len(batch)
            yield batch

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:
        c = self.config
        if not c.weight:
            return super().loss(model, batch, turn)
        weights = perturbation.trained(model)
        if not self.average:
            self.average = {name: weight.detach().clone() for name, weight in weights.items()}
        self.advance(list(self.average.values()), list(weights.values()), 0)
        if self.epoch <= c.start_epoch:
            return super().loss(model, batch, turn)
        with torch.no_grad(), perturbation.same_draws(self.task.device):
            past = perturbation.at(model, self.average, lambda earlier: earlier(batch.x))
        outputs: Tensor = model(batch.x)
        weight: float = c.weight
        return F.cross_entropy(outputs, batch.y) + weight * trajectory_loss(outputs, past, c.temperature)
