"""CEMA's cloud: a foundation model that adapts on uploads, and copies of the edge model that learn from it.

Only affine parameters of normalisation layers are trained, on both; batch-norm statistics follow the uploads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trellis import seeding
from trellis.models import adaptation
from trellis_server.distillation import Renormalised, Weights, distillation_loss, entropy_loss


@dataclass(frozen=True)
class Settings:
    """How the cloud adapts; see the strategy's ``Config`` for what each means.

    ``e_max`` is in nats; ``follow`` says whether the edge copies' batch-norm statistics follow the uploads.
    """

    e_max: float
    upload_batch: int
    replay_batch: int
    replay_size: int
    replay_least: int
    foundation_lr: float
    edge_lr: float
    momentum: float
    weights: Weights
    temperature: float
    distil: bool
    follow: bool
    max_grad_norm: float | None


class Student:
    """One adapting model: its normalisation, its optimiser, and uploads that wait for a full batch."""

    def __init__(
        self, model: nn.Module, lr: float, momentum: float, max_grad_norm: float | None, follow: bool = True
    ) -> None:
        self.model = adaptation.train_only_affine(model)
        self.run = Renormalised(model, follow=follow)
        self.affine = adaptation.affine(model)
        self.optimizer = torch.optim.SGD(self.affine.values(), lr=lr, momentum=momentum)
        self.max_grad_norm = max_grad_norm
        self.waiting: list[Tensor] = []

    def step(self, loss: Tensor) -> float:
        """Take one step; return the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(list(self.affine.values()), self.max_grad_norm)
        self.optimizer.step()
        return float(loss.detach())

    def tensors(self) -> dict[str, Tensor]:
        """Return all that adaptation changes in the model: affine parameters and running statistics."""
        return adaptation.affine(self.model) | adaptation.statistics(self.model)

    def state(self) -> dict[str, Any]:
        """Return everything that later steps depend on, as arrays and plain data."""
        moments = [self.optimizer.state[p].get("momentum_buffer") for p in self.affine.values()]
        return {
            "tensors": {name: _array(values) for name, values in self.tensors().items()},
            "momentum": {
                name: _array(m) for name, m in zip(self.affine, moments, strict=True) if isinstance(m, Tensor)
            },
            "started": self.run.started,
            "waiting": [_array(image) for image in self.waiting],
        }

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        live = self.tensors()
        with torch.no_grad():
            for name, values in state["tensors"].items():
                live[name].copy_(torch.from_numpy(values))
        for name, values in state["momentum"].items():
            self.optimizer.state[self.affine[name]]["momentum_buffer"] = torch.from_numpy(values).to(device)
        self.run.started = state["started"]
        self.waiting = [torch.from_numpy(image).to(device) for image in state["waiting"]]


def _array(values: Tensor) -> Any:
    return values.detach().cpu().numpy().copy()


@dataclass
class Report:
    """What one round of adaptation did."""

    steps: int = 0
    foundation_loss: float = 0.0
    edge_loss: float = 0.0
    samples: int = 0
    updated: set[int] = field(default_factory=set)


class CloudAdaptation:
    """Foundation model, edge copies by number, and the replay buffer of all uploads.

    Args:
        foundation: makes the foundation model, trained on clean data; called when the first uploads are there.
        edge: the edge's model, trained on clean data; copied for every edge copy.
        settings: see there.
        seed: the run's; which uploads are replayed depends on it and the step's number.
        device: where the models are.
    """

    def __init__(
        self,
        foundation: Callable[[], nn.Module],
        edge: nn.Module,
        settings: Settings,
        seed: int,
        device: torch.device,
    ) -> None:
        self.make_foundation = foundation
        self.settings, self.seed, self.device = settings, seed, device
        self.source = edge
        self.copies: dict[int, Student] = {}
        self.replay: list[Tensor] = []
        self.steps = 0

    @cached_property
    def foundation(self) -> Student:
        """The foundation model; edges that upload nothing need none."""
        s = self.settings
        return Student(self.make_foundation(), s.foundation_lr, s.momentum, s.max_grad_norm)

    def copy(self, number: int) -> Student:
        """Return the edge copy of a number, a new one of the source model if there was none."""
        if number not in self.copies:
            s = self.settings
            self.copies[number] = Student(copy.deepcopy(self.source), s.edge_lr, s.momentum, s.max_grad_norm, s.follow)
        return self.copies[number]

    def adapt(self, uploads: dict[int, Tensor]) -> Report:
        """Take in one round's uploads by edge copy, and adapt for as long as full batches wait.

        A copy without a full batch takes one step on replayed uploads, once there are enough.

        Args:
            uploads: inputs of the models, ``(n, channels, height, width)``, by number of the edge copy.
        """
        report, s = Report(), self.settings
        for number, images in sorted(uploads.items()):
            student = self.copy(number)
            student.waiting.extend(images)
            self.replay = [*self.replay, *images][-s.replay_size :] if s.replay_size else []
            stepped = False
            while len(student.waiting) >= s.upload_batch:
                batch = torch.stack(student.waiting[: s.upload_batch])
                del student.waiting[: s.upload_batch]
                self._step(student, batch, report)
                stepped = True
            if not stepped and s.distil and len(self.replay) > max(s.replay_least, s.upload_batch + s.replay_batch):
                self._distil(student, self._replayed(s.upload_batch + s.replay_batch), report)
                stepped = True
            if stepped:
                report.updated.add(number)
        return report

    def _step(self, student: Student, batch: Tensor, report: Report) -> None:
        """Adapt the foundation model on a batch of uploads, then the edge copy on them and on replayed ones."""
        s = self.settings
        if not s.distil:
            loss = entropy_loss(student.run(batch, adapting=True), s.e_max)
            report.edge_loss += student.step(loss)
            report.steps, report.samples, self.steps = report.steps + 1, report.samples + len(batch), self.steps + 1
            return
        loss = entropy_loss(self.foundation.run(batch, adapting=True), s.e_max)
        report.foundation_loss += self.foundation.step(loss)
        if len(self.replay) >= max(s.replay_least, s.replay_batch) and s.replay_batch:
            batch = torch.cat([batch, self._replayed(s.replay_batch)])
        self._distil(student, batch, report)

    def _distil(self, student: Student, batch: Tensor, report: Report) -> None:
        s = self.settings
        teacher = self.foundation.run(batch, adapting=False)  # after its own update, with its statistics at rest
        logits = student.run(batch, adapting=True)
        report.edge_loss += student.step(distillation_loss(logits, teacher, s.e_max, s.weights, s.temperature))
        report.steps, report.samples, self.steps = report.steps + 1, report.samples + len(batch), self.steps + 1

    def _replayed(self, count: int) -> Tensor:
        """Return random uploads from the buffer, without repetition."""
        generator = seeding.torch_generator(self.seed, "cema-replay", self.steps)
        chosen = torch.randperm(len(self.replay), generator=generator)[:count]
        return torch.stack([self.replay[int(i)] for i in chosen])

    def state(self) -> dict[str, Any]:
        """Return everything that later steps depend on but the frozen weights, as arrays and plain data."""
        return {
            "foundation": self.foundation.state() if "foundation" in vars(self) else None,
            "copies": {number: student.state() for number, student in self.copies.items()},
            "replay": _array(torch.stack(self.replay)) if self.replay else None,
            "steps": self.steps,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        if state["foundation"] is not None:
            self.foundation.load_state(state["foundation"], self.device)
        for number, each in state["copies"].items():
            self.copy(number).load_state(each, self.device)
        replay = state["replay"]
        self.replay = [] if replay is None else list(torch.from_numpy(replay).to(self.device))
        self.steps = state["steps"]
