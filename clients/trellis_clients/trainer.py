"""The trainer contract: what one client does with its data.

A paper's method is a subclass that overrides the few hooks it changes; every hook has a default that does
the ordinary thing. The hooks, in the order in which a round calls them::

    build()                                the model (or models, as one module)
    load_shared(model, arrays)             take in what the cloud sent
    fit(model, data, state, turn)          the local training loop, in terms of those below
        optimizer(model, turn)
        batches(split, turn)               mini-batches, in a seeded order
        backward(model, batch, turn)       one step's gradients, by default those of
        loss(model, batch, turn)           one supervised step's objective
        adjust_gradients(model, state, turn)
    shared(model)                          what crosses the wire, by name
    evaluate(model, split, turn)           the task's own metrics
    adapt(model, stream, state, turn)      unlabeled test stream in, predictions out, in order
    answer(action, model, data, state, turn)   a question of the strategy that is not training

``state`` is a dictionary private to the client. It lives across rounds and restarts and is never sent. It
may hold tensors, numbers, text, bytes, and dictionaries or lists of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.data.base import Batch, ClientData, Split
from trellis.scenario import Strict
from trellis_clients import batchnorm

Metrics = dict[str, float]
State = dict[str, Any]

NonNegative = Annotated[float, Field(ge=0)]


class TrainerConfig(Strict):
    """Hyperparameters that every trainer shares. Defaults suit the bundled small data."""

    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegative = 0.0
    local_epochs: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 32
    drop_last: bool = Field(False, description="leave out a last batch that is smaller than batch_size")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    batch_norm: Literal["average", "local", "recalibrate"] = Field(
        "average",
        description="average: batch-norm layers travel like the rest; local: they stay on the client; "
        "recalibrate: affine parameters travel, statistics are computed anew on the client's data",
    )


@dataclass(frozen=True)
class Task:
    """What is to be learnt, as far as a trainer needs to know.

    Attributes:
        kind: kind of data, one of ``trellis.data.base.KINDS``.
        shape: shape of one example's ``x``.
        classes: class names in label order; empty where there are none.
        facts: what the data set says beyond that (vocabulary size, node count).
        model: builds the scenario's model with fresh weights from the surrounding random state.
        seed: the run's seed, for things that all clients must build alike.
        device: where model and data live.
        splits: the data set's further streams by name, the same for everybody, e.g. something to pretrain on.
    """

    kind: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    facts: Mapping[str, Any]
    model: Callable[[], nn.Module]
    seed: int
    device: torch.device
    splits: Mapping[str, Split] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.classes)


@dataclass
class Turn:
    """One client's turn in one round.

    Attributes:
        round: from 1; 0 before training.
        num_rounds: planned rounds, for schedules over global progress.
        client: the client's number; -1 in the cloud.
        num_clients: clients of the federation.
        generator: CPU generator that depends on seed, round and client only.
        config: what the strategy sent beside arrays (e.g. ``proximal-mu``).
        received: every ArrayRecord of the message as tensors, e.g. ``received["arrays"]``. Read-only.
        reply: ArrayRecords to send beside ``arrays``; a trainer fills it in ``fit``.
        data: the client's own data, where it evaluates: an example's answer may need others of them, as a node's
            needs its neighbours. None in the cloud.
    """

    round: int
    num_rounds: int
    client: int
    num_clients: int
    generator: torch.Generator
    config: Mapping[str, Any] = field(default_factory=dict)
    received: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    reply: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    data: ClientData | None = None

    @property
    def progress(self) -> float:
        """Share of the planned rounds that lie behind, in [0, 1)."""
        return max(self.round - 1, 0) / max(self.num_rounds, 1)


class Trainer:
    """Plain local SGD on the scenario's model with cross-entropy; the base of every trainer."""

    class Config(TrainerConfig):
        """Nothing beyond the shared hyperparameters."""

    metric: ClassVar[tuple[str, Literal["max", "min"]]] = ("accuracy", "max")
    """The metric that says how good the model is, and in which direction."""

    def __init__(self, config: Any, task: Task) -> None:
        self.config = config
        self.task = task

    # -- the model ------------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        """Return the model. Called once per worker process, under the run's seed, on every side alike.

        A method with several models returns them as one module (``nn.ModuleDict``) and lets ``shared``
        pick what travels. A frozen base that every side can build need never be sent.
        """
        return self.task.model()

    def shared(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what crosses the wire: names and live tensors of the model, not copies.

        By default all floating-point parameters and buffers, less what ``batch_norm`` or ``kept`` keep on the
        client. Integer buffers (batch norm's counters) have no average.
        """
        private = batchnorm.private_names(model, self.config.batch_norm) | self.kept(model)
        state = model.state_dict()
        return {name: v for name, v in state.items() if name not in private and v.is_floating_point()}

    def kept(self, model: nn.Module) -> set[str]:
        """Return names in the state dict that stay on each client, from turn to turn and where it evaluates.

        By default the batch-norm layers, where ``batch_norm`` is ``local``. A method with a head or a trunk of each
        client's own names it here. The cloud has none of them, so a central evaluation means little then.
        """
        local = getattr(self.config, "batch_norm", "average") == "local"
        return batchnorm.private_names(model, "local") if local else set()

    def load_shared(self, model: nn.Module, arrays: Mapping[str, Tensor]) -> None:
        """Copy what the cloud sent into the model, in place."""
        own = self.shared(model)
        if arrays:
            with torch.no_grad():
                torch._foreach_copy_([own[name] for name in arrays], list(arrays.values()))

    def frozen(self, number: int) -> tuple[str, ...]:  # noqa: ARG002
        """Return the beginnings of names of shared arrays that a round no longer changes; by default none.

        The strategy ``partial`` sends these once and then no more; other strategies keep sending them.
        """
        return ()

    # -- training -------------------------------------------------------------------------------------

    def optimizer(self, model: nn.Module, turn: Turn) -> torch.optim.Optimizer:  # noqa: ARG002
        """Return a fresh optimizer of what is trained."""
        c = self.config
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay)

    def batches(self, split: Split, turn: Turn) -> Iterator[Batch]:
        """Yield ``local_epochs`` passes over a split in mini-batches of a seeded order."""
        size, count = self.config.batch_size, len(split)
        for _ in range(self.config.local_epochs):
            order = torch.randperm(count, generator=turn.generator).to(split.rows.device)
            rows = split.rows[order]
            for start in range(0, count, size):
                index = order[start : start + size]
                if len(index) < size and self.config.drop_last and start:
                    break
                yield split.gather(rows[start : start + size], index)

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:  # noqa: ARG002
        """Return the scalar objective of one step: mean cross-entropy."""
        return F.cross_entropy(model(batch.x), batch.y)

    def backward(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:
        """Add one step's gradients to the model's and return its objective, detached.

        A method that sends an objective back in several parts, to hold only one part's graph at a time, overrides this.
        """
        loss = self.loss(model, batch, turn)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def adjust_gradients(self, model: nn.Module, state: State, turn: Turn) -> None:  # noqa: ARG002
        """Change gradients between backward and step; by default clip them if the config says so."""
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)

    def fit(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        """Train on the client's data and return its metrics, ``loss`` among them (mean over examples seen)."""
        optimizer = self.optimizer(model, turn)
        total, seen = torch.zeros((), device=self.task.device), 0
        model.train()
        for batch in self.batches(data.train, turn):
            optimizer.zero_grad(set_to_none=True)
            loss = self.backward(model, batch, turn)
            self.adjust_gradients(model, state, turn)
            optimizer.step()
            total += loss * len(batch)  # no .item() here: it would wait for the device every step
            seen += len(batch)
        return {"loss": float(total) / max(seen, 1)}

    # -- use ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split, turn: Turn, batch_size: int = 256) -> Metrics:  # noqa: ARG002
        """Return the task's metrics on a split: mean cross-entropy ``loss`` and ``accuracy``."""
        model.eval()
        loss, right = torch.zeros((), device=self.task.device), torch.zeros((), device=self.task.device)
        for batch in in_order(split, batch_size):
            logits = model(batch.x)
            loss += F.cross_entropy(logits, batch.y, reduction="sum")
            right += (logits.argmax(1) == batch.y).sum()
        return {"loss": float(loss) / max(len(split), 1), "accuracy": float(right) / max(len(split), 1)}

    @torch.no_grad()
    def adapt(self, model: nn.Module, stream: Iterable[Batch], state: State, turn: Turn) -> Iterator[Tensor]:  # noqa: ARG002
        """Take an unlabeled stream in order and yield one tensor of outputs per batch; by default unadapted."""
        model.eval()
        for batch in stream:
            yield model(batch.x)

    def answer(self, action: str, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        """Answer a strategy's message of type ``query.<action>`` or ``train.<action>``.

        Arrays to send back (statistics, prototypes, scores) go into ``turn.reply``, records by name. By default the
        questions in ``trellis_clients.queries`` are known to every trainer.

        Raises:
            PluginError: this trainer does not know the question.
        """
        from trellis_clients import queries

        return queries.answer(self, action, model, data, state, turn)


def in_order(split: Split, batch_size: int) -> Iterator[Batch]:
    """Yield a split's examples in their own order."""
    for start in range(0, len(split), batch_size):
        stop = min(start + batch_size, len(split))
        yield split.batch(torch.arange(start, stop, device=split.rows.device))
