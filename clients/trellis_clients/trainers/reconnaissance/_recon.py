"""What the learners of federated reconnaissance share: missions, the table of classes, evaluation by groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.data.base import ClientData, Split
from trellis.errors import DataError, ScenarioError
from trellis.missions import Missions, Schedule
from trellis_clients.trainer import Metrics, State, Task, Trainer, TrainerConfig, Turn, in_order

MISSION = "mission"
"""Action of a ``train.mission`` message, and the key of its config that says which mission it is, from 1."""
EVIDENCE = "evidence"
EXEMPLARS = "exemplars"
GROUPS = ("base", "field", "own")
"""Classes of the cloud, classes found in the field by anybody, and those the client itself was shown."""


class ReconConfig(TrainerConfig):
    """Hyperparameters of all learners of reconnaissance. ``lr``, ``local_epochs`` and the like are for missions."""

    lr: Annotated[float, Field(gt=0)] = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    local_epochs: Annotated[int, Field(ge=1)] = 5
    missions: Missions = Missions()
    base_lr: Annotated[float, Field(gt=0)] = Field(1e-3, description="Adam's, for learning the base classes")
    base_epochs: Annotated[int, Field(ge=1)] = Field(8, description="passes over the base classes' images")


class ReconModel(nn.Module):
    """A classifier and the table of what the federation knows.

    Attributes:
        net: the scenario's model, with ``features`` and a linear ``head`` over all classes.
        counts: int64 ``(classes,)``, examples the federation has learnt of each class; 0 is an unknown class.
        table: float32 ``(classes, D)``, one vector per class for learners that classify by nearest vector.
    """

    counts: Tensor
    table: Tensor

    def __init__(self, net: nn.Module, num_classes: int) -> None:
        super().__init__()
        head = getattr(net, "head", None)
        if not isinstance(head, nn.Linear) or not hasattr(net, "features"):
            raise ScenarioError(
                "recon-model", f"reconnaissance needs a model with features and a linear head, not {net!r:.60}"
            )
        self.net = net
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("table", torch.zeros(num_classes, head.in_features))

    @property
    def known(self) -> Tensor:
        """Which classes the federation has learnt, bool ``(classes,)``."""
        return self.counts > 0

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.net.features(x)  # type: ignore[operator]
        return features


class Recon(Trainer):
    """The base of the learners: a subclass says how base classes are learnt, a mission, and what the cloud does then.

    Attributes:
        uploads: ArrayRecords that a mission is answered with beside ``evidence``.
        sends_means: whether the evidence holds mean embeddings, or counts only.
    """

    class Config(ReconConfig):
        pass

    uploads: ClassVar[tuple[str, ...]] = ()
    sends_means: ClassVar[bool] = False

    def __init__(self, config: Any, task: Task) -> None:
        super().__init__(config, task)
        self.schedule = Schedule(config.missions, task.num_classes, task.seed)

    def build(self) -> ReconModel:
        return ReconModel(self.task.model(), self.task.num_classes)

    def shared(self, model: nn.Module) -> dict[str, Tensor]:
        """Return weights and table. Counts are integers and travel nonetheless: they say which classes are known."""
        assert isinstance(model, ReconModel)
        arrays = super().shared(model)
        return {**{name: v for name, v in arrays.items() if self.travels(name)}, "counts": model.counts}

    def travels(self, name: str) -> bool:
        """Whether an array of the model is of use to this learner."""
        return name != "table"

    # -- the base classes, in the cloud ---------------------------------------------------------------

    def base_split(self, split: Split) -> Split:
        """Return the examples of base classes."""
        labels = split.fields["y"][split.rows]
        base = torch.tensor(self.schedule.base, device=labels.device)
        return split.subset(torch.isin(labels, base).nonzero()[:, 0])

    def fit(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:  # noqa: ARG002
        """Learn the base classes from the base examples of ``data``; the cloud does so once, in the first round."""
        assert isinstance(model, ReconModel)
        return self.learn_base(model, self.base_split(data.train), turn)

    def learn_base(self, model: ReconModel, split: Split, turn: Turn) -> Metrics:
        """Train the model on base classes by Adam. By default supervised, over the base classes' logits."""
        known = torch.zeros_like(model.known)
        known[list(self.schedule.base)] = True
        optimizer = torch.optim.Adam(model.net.parameters(), lr=self.config.base_lr)
        return self.supervised(model, split, turn, optimizer, known, self.config.base_epochs)

    def supervised(
        self,
        model: ReconModel,
        split: Split,
        turn: Turn,
        optimizer: torch.optim.Optimizer,
        known: Tensor,
        epochs: int,
    ) -> Metrics:
        """Train on labelled examples, over the logits of known classes. Returns the mean ``loss`` of the last epoch."""
        model.train()
        total, seen = torch.zeros((), device=self.task.device), 0
        for _ in range(epochs):
            total.zero_()
            seen = 0
            order = torch.randperm(len(split), generator=turn.generator)
            for index in chunks(order, self.config.batch_size):
                if len(index) < 2 and len(order) > 1:
                    continue  # batch norm has no statistics of one example
                batch = split.batch(index.to(split.rows.device))
                optimizer.zero_grad(set_to_none=True)
                loss = self.objective(model, batch.x, batch.y, known)
                loss.backward()  # type: ignore[no-untyped-call]
                self.adjust_gradients(model, {}, turn)
                optimizer.step()
                total += loss.detach() * len(batch)
                seen += len(batch)
        return {"loss": float(total) / max(seen, 1)}

    def objective(self, model: ReconModel, x: Tensor, y: Tensor, known: Tensor) -> Tensor:
        """Return the loss of one step: cross-entropy over known classes."""
        return F.cross_entropy(model.net(x).masked_fill(~known, -torch.inf), y)

    # -- a mission, on a client -----------------------------------------------------------------------

    def answer(self, action: str, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        """Go on a mission: learn from new images of a few classes, and report.

        The reply holds the ArrayRecord ``evidence`` (labels, counts, means, version), those of ``uploads``, and as
        metrics how well the client's own copy does before anything is merged, by groups of classes, on the client's
        test split.

        Raises:
            DataError: the client has no image left that it has not seen.
        """
        if action != MISSION:
            return super().answer(action, model, data, state, turn)
        assert isinstance(model, ReconModel)
        mission = int(turn.config[MISSION])
        labels = data.train.fields["y"][data.train.rows].cpu().numpy()
        positions = torch.from_numpy(self.schedule.images(labels, mission, turn.client))
        if not len(positions):
            raise DataError("mission-empty", f"client {turn.client} has no unseen images for mission {mission}")
        seen = data.train.subset(positions.to(data.train.rows.device))
        evidence = self.evidence(model, seen, mission)
        metrics = self.learn(model, seen, turn)
        turn.reply[EVIDENCE] = evidence
        self.remember(model, evidence)
        own = torch.zeros_like(model.known)
        own[list(self.schedule.classes(mission, turn.client))] = True
        judged = self.judged(model, data.test, own)
        visited = {"num-examples": len(seen), "classes": len(evidence["labels"])}
        return {**metrics, **visited, **judged}

    def learn(self, model: ReconModel, seen: Split, turn: Turn) -> Metrics:
        """Learn from a mission's images and put what goes to the cloud into ``turn.reply``."""
        raise NotImplementedError

    def remember(self, model: ReconModel, evidence: Mapping[str, Tensor]) -> None:
        """Enter new evidence into the client's own copy of the table."""
        model.counts[evidence["labels"]] += evidence["counts"]

    @torch.no_grad()
    def evidence(self, model: ReconModel, split: Split, version: int) -> dict[str, Tensor]:
        """Return labels, counts and mean embeddings (float32) of a split, by rising label.

        Embeddings are averaged in float64, by the frozen encoder in evaluation mode.
        """
        y = split.fields["y"][split.rows]
        labels, place, counts = torch.unique(y, return_inverse=True, return_counts=True)
        width = model.table.shape[1] if self.sends_means else 0
        sums = torch.zeros(len(labels), width, dtype=torch.float64, device=y.device)
        if width:
            sums.index_add_(0, place, self.embedded(model, split).double())
        means = (sums / counts[:, None]).float()
        number = torch.tensor(version, dtype=torch.int64)
        return {"labels": labels, "counts": counts, "means": means, "version": number}

    @torch.no_grad()
    def embedded(self, model: ReconModel, split: Split, batch_size: int = 256) -> Tensor:
        """Return the embeddings of a split in its order, ``(n, D)``."""
        model.eval()
        parts = [model.features(batch.x) for batch in in_order(split, batch_size)]
        return torch.cat(parts) if parts else model.table[:0]

    # -- after the merge, in the cloud ----------------------------------------------------------------

    def consolidate(self, model: ReconModel, pool: Split, turn: Turn) -> tuple[Metrics, Tensor | None]:  # noqa: ARG002
        """Let the cloud learn from pooled examples. Returns metrics, and positions to keep of the pool (None: all)."""
        return {}, None

    # -- evaluation -----------------------------------------------------------------------------------

    def logits(self, model: ReconModel, x: Tensor) -> Tensor:
        """Return one score per class, unknown ones included."""
        logits: Tensor = model.net(x)
        return logits

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split, turn: Turn, batch_size: int = 256) -> Metrics:
        """Return accuracy and loss over all classes the federation has learnt so far, and by groups of these.

        In the cloud ``accuracy-base`` and ``accuracy-field`` are given where there is such an example. A client gives
        ``right-<group>`` and ``total-<group>`` instead, for the cloud to add up; ``own`` are the classes it was shown.
        """
        assert isinstance(model, ReconModel)
        own = torch.zeros_like(model.known)
        if turn.client >= 0:
            mission = int(turn.config.get(MISSION, 0))
            own[list(self.schedule.own(mission, turn.client))] = True
        metrics = self.judged(model, split, own, batch_size)
        if turn.client >= 0:
            return metrics
        result = {name: metrics[name] for name in ("accuracy", "loss")} | {"classes": int(model.known.sum())}
        for group in ("base", "field"):
            if metrics[f"total-{group}"]:
                result[f"accuracy-{group}"] = metrics[f"right-{group}"] / metrics[f"total-{group}"]
        return result

    @torch.no_grad()
    def judged(self, model: ReconModel, split: Split, own: Tensor, batch_size: int = 256) -> Metrics:
        """Classify the examples of known classes among all known classes; count how many are right, by groups.

        Without any known class there is nothing to judge: accuracy 0 and the loss of a guess among all classes.
        """
        model.eval()
        known = model.known
        base = torch.zeros_like(known)
        base[list(self.schedule.base)] = True
        groups = {"base": base, "field": ~base, "own": own}
        tallies = {group: [0, 0] for group in groups}
        right = total = 0
        loss = 0.0
        labels = split.fields["y"][split.rows]
        judged = split.subset(known[labels].nonzero()[:, 0])
        for batch in in_order(judged, batch_size):
            scores = self.logits(model, batch.x).masked_fill(~known, -torch.inf)
            loss += float(F.cross_entropy(scores, batch.y, reduction="sum"))
            hit = scores.argmax(1) == batch.y
            right, total = right + int(hit.sum()), total + len(batch)
            for group, members in groups.items():
                inside = members[batch.y]
                tallies[group][0] += int((hit & inside).sum())
                tallies[group][1] += int(inside.sum())
        guess = float(torch.tensor(float(self.task.num_classes)).log())
        metrics: Metrics = {"accuracy": right / max(total, 1), "loss": loss / total if total else guess}
        for group, (hits, count) in tallies.items():
            metrics |= {f"right-{group}": hits, f"total-{group}": count}
        return metrics


def labelled(parts: Iterable[Mapping[str, Tensor]]) -> Split:
    """Return a split of examples in memory, one part after the other; the reverse of ``examples``."""
    held = list(parts)
    return Split.whole(**{name: torch.cat([part[name] for part in held]) for name in ("x", "y")})


def examples(split: Split) -> dict[str, Tensor]:
    """Return the examples of a split as arrays to send."""
    return {name: split.fields[name][split.rows] for name in ("x", "y")}


def chunks(index: Tensor, size: int) -> Iterator[Tensor]:
    """Yield positions in pieces of a batch each."""
    for start in range(0, len(index), size):
        yield index[start : start + size]


def labels_of(split: Split) -> list[int]:
    """Return the labels that occur in a split, rising."""
    return sorted(set(split.fields["y"][split.rows].tolist()))
