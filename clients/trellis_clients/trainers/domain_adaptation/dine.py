"""DINE: learn a target domain from a predictor that only answers queries, and then from oneself."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from trellis import seeding
from trellis.data.base import Batch, ClientData, Split
from trellis.errors import PluginError
from trellis.models._base import Classifier
from trellis.registry import register
from trellis.scenario import Component
from trellis_clients import batchnorm
from trellis_clients.trainer import Metrics, State, Task, Trainer, TrainerConfig, Turn, in_order
from trellis_clients.trainers.domain_adaptation._black_box import (
    BlackBox,
    checked,
    sources,
    trained_predictors,
    untrained,
)

MEMORY = "memory"
"""Key of a client's state: what is believed of each of its images, ``(n, classes)``, and the field of its batches."""
STEP, OPTIMIZER, LABELS, STOPPED = "step", "optimizer", "labels", "stopped"
EPSILON = 1e-5
PARTS = 10
"""Refreshes of the memory, and checks for a halt, in the whole of a phase."""
PREDICTOR = "trainer.predictor"


def _known(model: Component) -> Component:
    # A file is found relative to the working folder, and is looked at only when the network is built.
    if ".py:" not in model.name:
        checked(model, PREDICTOR)
    return model


class Student(Classifier):
    """The scenario's model up to its features, a bottleneck with batch norm, and a weight-normalised head."""

    def __init__(self, trunk: nn.Module, width: int, bottleneck: int, classes: int) -> None:
        super().__init__()
        self.trunk, self.bottleneck, self.norm = trunk, nn.Linear(width, bottleneck), nn.BatchNorm1d(bottleneck)
        self.head = weight_norm(nn.Linear(bottleneck, classes))

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.bottleneck(self.trunk.features(x)))  # type: ignore[operator]
        return out


@register(
    "trainers",
    "dine",
    summary="DINE: adaptation from black-box predictors, with a memory of every sample",
    paper="arXiv 2104.01539",
    takes=("image",),
    sends="weights",
)
class Dine(Trainer):
    """Liang et al., "DINE: Domain Adaptation from Single and Multiple Black-box Predictors", CVPR 2022.

    A client is a target domain without labels (its examples' labels are never read here). In its first turn it asks
    every predictor once for every image, averages the answers and smooths them; the result stays in its state, by
    sample. *Distilling*: KL divergence from the memory, mixup consistency with the student's own answers, mutual
    information; every tenth of the phase the student's answers enter the memory with weight ``1 - memory_momentum``:
    the predictor's word fades as 0.6^k. *Tuning*: mutual information alone, from a fresh optimizer, until no answer
    changes between two checks. Phases, rates and refreshes go by the client's own steps, of which it expects as many
    as the rounds hold. Losses, schedule and the parts of the student follow the authors' code.

    What differs from it: the two backward passes are one here, of the sum. Mixed images normalise by their own
    statistics and leave the running ones alone, which the code intends and does not do. Images are not augmented,
    where the code crops and mirrors at random. Networks start from torch's own initialisation, the trunk not from
    ImageNet, bottleneck and head not Xavier-normal; so ``trunk_rate`` is 1 in place of 0.1. The predictor is trained by
    Adam. The variants for partial sets and segmentation are not here.

    Mutual information takes classes to be equally frequent at each client; lower its weight where they are not. On
    digits, from nothing, a memory that follows the student pays after some forty passes over the images, not before.

    **Federated.** The predictors stand for services: they are trained in each process on the data set's streams
    ``source-*`` and used through a function alone. Averages of students of different domains undo the adaptation: with
    ``share: trunk`` bottleneck, head and batch norms stay on the client. A client that has stopped sends its trunk as
    it came, and updates grow where tuning begins: set ``screening.allow_unchanged`` and a larger ``max_norm_ratio``.
    """

    class Config(TrainerConfig):
        lr: float = Field(1e-2, gt=0, description="at first, of all but the trunk")
        momentum: float = Field(0.9, ge=0, lt=1)
        weight_decay: float = Field(1e-3, ge=0)
        batch_size: int = Field(64, ge=2)
        kept_classes: int = Field(1, ge=1, description="r: probabilities that are taken from the predictor's answer")
        memory_momentum: float = Field(0.6, ge=0, le=1, description="gamma; 1 never changes the memory")
        mix_beta: float = Field(0.3, gt=0, description="of the Beta distribution of mixup's lambda")
        mix_weight: float = Field(1.0, ge=0)
        information_weight: float = Field(1.0, ge=0)
        distil: float = Field(0.75, gt=0, le=1, description="share of the rounds that distil; the rest tunes")
        bottleneck: int = Field(64, ge=1, description="256 in the paper")
        trunk_rate: float = Field(1.0, gt=0, description="the trunk's learning rate over lr; 0.1 if it is pretrained")
        tuning_trunk_rate: float = Field(0.1, gt=0, description="the same while tuning, when the trunk is trained")
        share: Literal["trunk", "all"] = Field("trunk", description="trunk, without batch norms; or all")
        predictor: Annotated[Component, AfterValidator(_known)] = Field(
            Component(name="mlp"), description="model of the predictors, like the key 'model'"
        )
        predictor_epochs: int = Field(30, ge=1)
        predictor_lr: float = Field(3e-3, gt=0)
        predictor_smoothing: float = Field(0.1, ge=0, lt=1, description="of the labels that they are trained on")

    config: Config

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task)
        self.predictors: list[BlackBox] | None = None

    def build(self) -> Student:
        """Return the student. What the predictors need is checked here, before the first round asks them.

        Raises:
            TrellisError: the model has no features, the data set no source, or the predictor's network does not fit.
        """
        sources(self.task)
        with seeding.scoped(self.task.seed, "black-box"):
            untrained(self.task, self.config.predictor, PREDICTOR)
        model = super().build()
        head = getattr(model, "head", None)
        if not callable(getattr(model, "features", None)) or not isinstance(head, nn.Linear):
            raise PluginError(
                "model-head", f"trainer 'dine' puts a head of its own on features: {type(model).__name__} has none"
            )
        model.head = nn.Identity()
        return Student(model, head.in_features, self.config.bottleneck, self.task.num_classes)

    def kept(self, model: nn.Module) -> set[str]:
        if self.config.share == "all":
            return super().kept(model)
        norms = batchnorm.private_names(model, "local")
        return norms | {name for name in model.state_dict() if not name.startswith("trunk.")}

    # -- the predictors and what is remembered of them ------------------------------------------------

    def ask(self, images: Tensor) -> Tensor:
        """Return the predictors' mean answer to images, ``(n, classes)``."""
        if self.predictors is None:
            c = self.config
            self.predictors = trained_predictors(
                self.task,
                c.predictor,
                PREDICTOR,
                epochs=c.predictor_epochs,
                lr=c.predictor_lr,
                smoothing=c.predictor_smoothing,
            )
        return torch.stack([predict(images) for predict in self.predictors]).mean(0)

    @torch.no_grad()
    def answers(self, model: nn.Module, data: Split) -> Tensor:
        """Return the student's probabilities for all images in their own order, in evaluation mode."""
        model.eval()
        found = torch.cat([model(batch.x).softmax(1) for batch in in_order(data, 256)])
        model.train()
        return found

    # -- training -------------------------------------------------------------------------------------

    def optimizer(self, model: nn.Module, turn: Turn) -> torch.optim.Optimizer:  # noqa: ARG002
        c = self.config
        trunk: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            (trunk if name.startswith("trunk.") else rest).append(parameter)
        groups = [{"params": trunk, "rate": c.lr * c.trunk_rate}, {"params": rest, "rate": c.lr}]
        nesterov = c.momentum > 0
        return torch.optim.SGD(groups, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay, nesterov=nesterov)

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:
        """Return the objective of a step: with a memory in the batch that of distilling, else that of tuning."""
        c, log = self.config, model(batch.x).log_softmax(1)
        loss = c.information_weight * information(log.exp())
        if MEMORY not in batch.fields:
            return loss
        loss = loss + F.kl_div(log, batch.fields[MEMORY], reduction="batchmean")
        share = float(torch.distributions.Beta(c.mix_beta, c.mix_beta).sample())
        order = torch.randperm(len(batch), generator=turn.generator).to(batch.x.device)
        own = log.detach().exp()
        with batchnorm.still_statistics(model):
            mixed = model(share * batch.x + (1 - share) * batch.x[order]).log_softmax(1)
        return loss + c.mix_weight * F.kl_div(mixed, share * own + (1 - share) * own[order], reduction="batchmean")

    def fit(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        images = data.train.batch(torch.arange(len(data.train), device=data.train.rows.device)).x
        queries = 0
        if MEMORY not in state:
            asked = torch.cat([self.ask(part) for part in torch.split(images, 256)])
            state |= {MEMORY: smoothed(asked, self.config.kept_classes), STEP: 0, STOPPED: False, "loss": 0.0}
            queries = len(images)
        # Without labels, and of the client's own rows only, so that the memory stands beside the images.
        own = Split.whole(x=images, **{MEMORY: state[MEMORY]})
        if not state[STOPPED]:
            self._train(model, own, state, turn)
        sure = float(state[MEMORY].max(1).values.mean())
        return {"loss": state["loss"], "queries": queries, "stopped": int(state[STOPPED]), "memory-confidence": sure}

    def _train(self, model: nn.Module, own: Split, state: State, turn: Turn) -> None:
        """Take a turn's steps; leaves step, memory, optimizer and mean loss in the state."""
        batches = [batch.index for batch in self.batches(own, turn) if len(batch) > 1]  # one image has no statistics
        whole = max(turn.num_rounds * len(batches), 1)
        distilling = max(round(self.config.distil * whole), 1)
        optimizer = self.optimizer(model, turn)
        if OPTIMIZER in state:
            optimizer.load_state_dict(state[OPTIMIZER])
        total = seen = 0.0
        model.train()
        for index in batches:
            step, batch = int(state[STEP]), own.batch(index)  # gathered here: the memory may have changed
            tuning = step >= distilling
            if step == distilling:
                optimizer = self.optimizer(model, turn)
            if tuning:
                optimizer.param_groups[0]["rate"] = self.config.lr * self.config.tuning_trunk_rate
                batch = Batch({"x": batch.x}, batch.index)
            begun, length = (distilling, max(whole - distilling, 1)) if tuning else (0, distilling)
            slow_down(optimizer, (step + 1 - begun) / length, 0.75 if tuning else 1.5)  # counted from one, as published
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss(model, batch, turn)
            loss.backward()  # type: ignore[no-untyped-call]
            self.adjust_gradients(model, state, turn)
            optimizer.step()
            total, seen = total + float(loss.detach()) * len(batch), seen + len(batch)
            state[STEP] = step + 1
            if (step + 1 - begun) % max(length // PARTS, 1) == 0 and step + 1 - begun < length:
                self._look_again(model, own, state, tuning)
            if state[STOPPED]:
                break
        state["loss"] = total / max(seen, 1)
        state[OPTIMIZER] = optimizer.state_dict()

    def _look_again(self, model: nn.Module, own: Split, state: State, tuning: bool) -> None:
        """Distilling: let the student's answers into the memory. Tuning: stop if none of them has changed."""
        answers = self.answers(model, own)
        if not tuning:
            state[MEMORY].mul_(self.config.memory_momentum).add_(answers, alpha=1 - self.config.memory_momentum)
            return
        labels = answers.argmax(1)
        state[STOPPED] = LABELS in state and bool(torch.equal(labels, state[LABELS]))
        state[LABELS] = labels


def smoothed(answers: Tensor, kept: int) -> Tensor:
    """Keep the largest probabilities of each row ``(n, classes)`` and spread the rest evenly over the other classes."""
    classes = answers.shape[1]
    if kept >= classes:
        return answers.clone()
    values, places = answers.topk(kept, dim=1)
    rest = (1 - values.sum(1, keepdim=True)) / (classes - kept)
    return rest.expand_as(answers).scatter(1, places, values)


def information(probabilities: Tensor) -> Tensor:
    """Return mean entropy less the entropy of the mean of ``(n, classes)``: minus the mutual information."""

    def entropy(p: Tensor) -> Tensor:
        return -(p * (p + EPSILON).log()).sum(-1)

    return entropy(probabilities).mean() - entropy(probabilities.mean(0))


def slow_down(optimizer: torch.optim.Optimizer, progress: float, power: float) -> None:
    """Set each group's rate to its own times ``(1 + 10 progress)^-power``."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * (1 + 10 * progress) ** -power
