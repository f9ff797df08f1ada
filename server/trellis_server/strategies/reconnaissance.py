"""Federated reconnaissance: clients find new classes on missions, and the cloud merges what they know of them.

The first round is the cloud's own: it learns the base classes from its own images, and no client is asked. Every
round after it is a mission: a ``train.mission`` message with the global model, answered with ``evidence`` - labels,
counts and mean embeddings of what is new - and, by learners that need them, weights or images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray
from pydantic import Field

from trellis import flower, records
from trellis.errors import ScenarioError
from trellis.missions import Schedule
from trellis.registry import register
from trellis_server import folding
from trellis_server.prototypes import Evidence, PrototypeStore
from trellis_server.strategies._build import BuildContext, Sampling, sampling
from trellis_server.strategies._mission_replies import (
    EVIDENCE,
    EXEMPLARS,
    MISSION,
    as_evidence,
    client_of,
    evidence_of,
    metrics_of,
    metrics_problem,
    pictures_of,
    pooled,
)

CLOUD = -1
"""The cloud as a client of its own: its evidence is of the base classes."""


@runtime_checkable
class Learner(Protocol):
    """What the strategy asks of the scenario's trainer, in the cloud.

    Attributes:
        schedule: the run's missions.
        uploads: records that a mission is answered with beside ``evidence``: ``arrays``, ``exemplars``.
        sends_means: whether the evidence holds mean embeddings.
    """

    schedule: Schedule
    uploads: tuple[str, ...]
    sends_means: bool

    def base_split(self, split: Any) -> Any: ...

    def learn_base(self, model: Any, split: Any, turn: Any) -> dict[str, float]: ...

    def evidence(self, model: Any, split: Any, version: int) -> Mapping[str, Any]: ...

    def consolidate(self, model: Any, pool: Any, turn: Any) -> tuple[dict[str, float], Any]: ...


class Reconnaissance(FedAvg):
    """Merges evidence exactly and in any order; averages weights and pools images for learners that send these.

    The global arrays hold the model, ``counts`` (examples learnt of each class; 0: unknown) and, for learners that
    classify by nearest vector, ``table``. The prototypes themselves are kept in ``PrototypeStore`` and are part of
    the strategy's state, as are the pooled images.

    Attributes:
        refused: client and reason of replies that could not be used and that no gate had stopped.

    Args:
        max_count: examples of one class that a client may claim on one mission.
        **sampling: as of ``FedAvg``.
    """

    def __init__(self, max_count: int = 100_000, **sampling: Any) -> None:
        super().__init__(**sampling)
        self.max_count = max_count
        self.site: Any = None
        self.arrays = ArrayRecord()
        self.config = ConfigRecord()
        self.store: PrototypeStore | None = None
        self.pool: dict[str, NDArray[Any]] = {}
        self.refused: dict[int, str] = {}

    def attach(self, bench: Any) -> None:
        """Take the cloud's use of the trainer.

        Raises:
            ScenarioError: the trainer does not take part in reconnaissance.
        """
        if not isinstance(bench.site.trainer, Learner):
            name = type(bench.site.trainer).__name__
            raise ScenarioError(
                "scenario-pairing", f"strategy 'reconnaissance' needs one of the recon- trainers, not {name}"
            )
        self.site = bench.site

    @property
    def learner(self) -> Learner:
        learner: Learner = self.site.trainer
        return learner

    # -- a round --------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send clients on a mission; in the first round ask nobody. Clients without unseen images stay at home."""
        self.arrays, self.config = arrays, ConfigRecord(dict(config))
        if self.site is None:  # without a cloud, as in a check of a single client: an ordinary message
            return super().configure_train(server_round, arrays, config, grid)
        if server_round == 1:
            return []
        mission = server_round - 1
        config[MISSION] = mission
        messages = super().configure_train(server_round, arrays, config, grid)
        exemplars = records.array_record(self.pool) if {"arrays", EXEMPLARS} <= set(self.learner.uploads) else None
        sent = []
        for message in messages:
            if not self._has_work(flower.client_of(message.metadata.dst_node_id), mission):
                continue
            if exemplars is not None:
                message.content[EXEMPLARS] = exemplars
            sent.append(Message(message.content, message.metadata.dst_node_id, f"train.{MISSION}"))
        return sent

    def _has_work(self, client: int, mission: int) -> bool:
        train = self.site.federation.client(client).train
        labels = train.fields["y"][train.rows].cpu().numpy()
        return len(self.learner.schedule.images(labels, mission, client)) > 0

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Learn the base classes, or merge the replies of a mission. The order of replies does not matter."""
        good = sorted((reply for reply in replies if not reply.has_error()), key=client_of)
        if server_round == 1:
            return self._base_round()
        accepted = []
        for reply in good:
            # The gate has looked at it already, unless the scenario switched the gate off.
            if problem := self._content_problem(reply):
                self.refused[client_of(reply)] = problem
                continue
            self._take(client_of(reply), evidence_of(reply), pictures_of(reply))
            accepted.append(reply)
        arrays = self._averaged(accepted) if "arrays" in self.learner.uploads and accepted else self.arrays
        cloud, arrays = self._consolidated(server_round, self._with_table(arrays))
        return arrays, MetricRecord({**pooled(accepted), **cloud, "rejected": len(good) - len(accepted)})

    def _base_round(self) -> tuple[ArrayRecord, MetricRecord]:
        site, learner = self.site, self.learner
        turn = self._turn(1, self.arrays)
        split = learner.base_split(site.federation.data.train)
        metrics = learner.learn_base(site.model, split, turn)
        known = learner.evidence(site.model, split, 0)
        num_classes = len(records.view(self.arrays["counts"]))
        evidence = as_evidence({name: tensor.cpu().numpy() for name, tensor in known.items()})
        self.store = PrototypeStore(num_classes, evidence.means.shape[1])
        images = {name: split.fields[name][split.rows].cpu().numpy() for name in ("x", "y")}
        self._take(CLOUD, evidence, images if EXEMPLARS in learner.uploads else {})
        cloud, arrays = self._consolidated(1, self._with_table(self._live()))
        return arrays, MetricRecord({**metrics, **cloud})

    def _take(self, client: int, evidence: Evidence, pictures: Mapping[str, NDArray[Any]]) -> None:
        """Merge evidence, and pool pictures of those labels that were not counted before."""
        assert self.store is not None
        fresh = self.store.add(client, evidence)
        if not pictures:
            return
        new = np.isin(pictures["y"], fresh)
        for name, values in pictures.items():
            kept = self.pool.get(name, values[:0])
            self.pool[name] = np.concatenate([kept, values[new]])

    def _averaged(self, replies: list[Message]) -> ArrayRecord:
        """Return the clients' weights, averaged by their examples."""
        average = folding.Average(self.weighted_by_key)
        for reply in replies:
            arrays = records.array_records(reply.content)[records.ARRAYS]
            examples = {self.weighted_by_key: metrics_of(reply)[self.weighted_by_key]}
            content = RecordDict({records.ARRAYS: arrays, records.METRICS: MetricRecord(examples)})
            average.add(flower.with_content(reply, content))
        averaged = records.array_records(average.message().content)[records.ARRAYS]
        return records.live(averaged, like=self.arrays)

    def _with_table(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return the arrays with what the store knows: counts, and prototypes where there are any."""
        assert self.store is not None
        changed = {"counts": self.store.counts.copy()}
        if self.store.width:
            changed["table"] = self.store.means().astype(np.float32)
        return records.array_record({**{name: records.view(array) for name, array in arrays.items()}, **changed})

    def _consolidated(self, number: int, arrays: ArrayRecord) -> tuple[dict[str, float], ArrayRecord]:
        """Let the cloud learn from the pooled images, if the learner has any use for them."""
        if EXEMPLARS not in self.learner.uploads:
            return {}, arrays
        import torch

        from trellis.data.base import Split

        turn = self._turn(number, arrays)
        pool = Split.whole(**{name: torch.from_numpy(values) for name, values in self.pool.items()})
        metrics, kept = self.learner.consolidate(self.site.model, pool.to(self.site.device), turn)
        if kept is not None:
            rows = kept.cpu().numpy()
            self.pool = {name: values[rows] for name, values in self.pool.items()}
        return metrics, self._live()

    def _live(self) -> ArrayRecord:
        """Return a copy of what the cloud's model holds now."""
        shared = self.site.trainer.shared(self.site.model)
        return records.array_record({name: tensor.detach().cpu().numpy().copy() for name, tensor in shared.items()})

    def _turn(self, number: int, arrays: ArrayRecord) -> Any:
        """Load arrays into the cloud's model and return its turn, as the site would for a client's message."""
        config = ConfigRecord({**dict(self.config), "server-round": number})
        content = RecordDict({records.ARRAYS: arrays, records.CONFIG: config})
        turn = self.site.turn(Message(content, flower.SERVER_NODE, "train"), CLOUD, "cloud")
        self.site.load(turn.received[records.ARRAYS], {})
        return turn

    # -- evaluation -----------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Have clients evaluate the merged model; they are told the mission, to know which classes are their own."""
        config[MISSION] = server_round - 1
        return super().configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:  # noqa: ARG002
        """Add up what clients counted: accuracy over all classes learnt so far, base, field and the client's own."""
        good = [reply for reply in replies if not reply.has_error() and metrics_problem(reply) is None]
        return MetricRecord({**pooled(good)}) if good else None

    # -- the gate -------------------------------------------------------------------------------------

    def expected_reply(self, message: Message) -> dict[str, dict[str, tuple[tuple[int | None, ...], str]]] | None:
        """Say which arrays a mission must be answered with."""
        if message.metadata.message_type != f"train.{MISSION}":
            return None
        sent = records.array_records(message.content)[records.ARRAYS]
        width = self.store.width if self.store is not None else 0
        expected: dict[str, dict[str, tuple[tuple[int | None, ...], str]]] = {
            EVIDENCE: {
                "labels": ((None,), "int64"),
                "counts": ((None,), "int64"),
                "means": ((None, width), "float32"),
                "version": ((), "int64"),
            }
        }
        if "arrays" in self.learner.uploads:
            expected[records.ARRAYS] = {name: (tuple(array.shape), array.dtype) for name, array in sent.items()}
        if EXEMPLARS in self.learner.uploads:
            shape = self.site.federation.data.example_shape
            expected[EXEMPLARS] = {"x": ((None, *shape), "float32"), "y": ((None,), "int64")}
        return expected

    def problem_with(self, message: Message, reply: Message) -> str | None:
        """Return what is wrong with a mission's evidence and pictures, as ``"code: reason"``, or None."""
        if message.metadata.message_type == "evaluate":
            return metrics_problem(reply)
        if message.metadata.message_type != f"train.{MISSION}":
            return None
        mission: Any = records.config_record(message.content, records.CONFIG)[MISSION]
        version = evidence_of(reply).version
        if not 1 <= version <= mission:
            return f"evidence: it is of mission {version}; this is mission {mission}"
        return self._content_problem(reply)

    def _content_problem(self, reply: Message) -> str | None:
        assert self.store is not None
        if problem := metrics_problem(reply):
            return problem
        evidence, pictures = evidence_of(reply), pictures_of(reply)
        if problem := evidence.problem(self.store.num_classes, self.store.width, self.max_count):
            return problem
        if not pictures:
            return None
        claimed = np.zeros(self.store.num_classes, np.int64)
        claimed[evidence.labels] = evidence.counts
        if len(pictures["x"]) != len(pictures["y"]):
            return f"exemplars: {len(pictures['x'])} pictures with {len(pictures['y'])} labels"
        labels, counts = np.unique(pictures["y"], return_counts=True)
        if len(labels) and not (labels[0] >= 0 and labels[-1] < len(claimed) and (counts <= claimed[labels]).all()):
            return "exemplars: there are pictures of classes, or more of a class, than the evidence counts"
        return None

    # -- state ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what the next round needs: prototypes, ledger and pooled pictures."""
        return {"store": self.store.state_dict() if self.store else None, "pool": self.pool}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.store = PrototypeStore.from_state(state["store"]) if state["store"] else None
        self.pool = dict(state["pool"])


@register(
    "strategies",
    "reconnaissance",
    summary="federated reconnaissance: merges what clients learn of new classes, exactly",
    paper="https://arxiv.org/abs/2109.00150",
    merges="missions",
)
class ReconnaissancePlugin:
    """The cloud of federated reconnaissance, for the trainers whose names start with ``recon-``."""

    class Config(Sampling):
        max_count: int = Field(100_000, ge=1, description="examples of a class a client may claim on one mission")

    def __init__(self, config: Config) -> None:
        self.config = config

    def build(self, context: BuildContext) -> Reconnaissance:
        return Reconnaissance(self.config.max_count, **sampling(self.config, context))
