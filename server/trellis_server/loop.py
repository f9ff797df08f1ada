"""The round, written once: configure, send, screen, fold, aggregate, evaluate, checkpoint.

The steps are those of Flower's ``Strategy.start``. What Flower's own loop lacks and this one has: a quorum,
replies in a fixed order, resume, a random state that depends on seed and round alone, and figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from trellis import flower, records, seeding
from trellis.errors import RoundError
from trellis.grids.base import ClientGrid, StreamGrid, innermost
from trellis.grids.ordered import Ordered
from trellis.grids.screened import Screened
from trellis.grids.traced import ReplyTrace, Traced
from trellis.runs import CellFolder, read_lines
from trellis.scenario import Scenario
from trellis_server import checkpoint, folding, strategy_state
from trellis_server.probe import Probe, probe_rounds


class Evaluate(Protocol):
    """Central evaluation: round number and global arrays in, metrics out, or None where nothing is held out."""

    def __call__(self, number: int, arrays: ArrayRecord) -> dict[str, float] | None: ...


@runtime_checkable
class Finishing(Protocol):
    """A strategy with one more step after the last round, e.g. a calibration of the classifier.

    A strategy may also have ``attach(bench)``: it is given the cloud's use of the trainer (``bench.site`` has the
    trainer, the model and the data) before anything else, or after its state was restored, and may return the arrays
    that a new run starts from instead of a fresh model's. And it may have a dict ``refused``: client and reason of
    answers that it could not use. They are written down as the gate's refusals are, and the dict is emptied.
    """

    def finish(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: StreamGrid, timeout: float
    ) -> tuple[ArrayRecord, MetricRecord | None]: ...


@dataclass
class Phases:
    """Wall and CPU seconds of the parts of a round."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
            self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu

    def totals(self) -> dict[str, Any]:
        """Return the keys of a metrics line that are about time."""
        return {
            "seconds": sum(self.wall.values()),
            "cpu_seconds": sum(self.cpu.values()),
            "phases": dict(self.wall),
        }


@dataclass
class Loop:
    """Runs one cell: one scenario under one seed.

    Args:
        scenario: complete, without variants.
        seed: of this cell.
        strategy: any Flower strategy.
        fresh: the same strategy once more, never used: what differs from it is the strategy's state.
        grid: clients, with the layers ``Traced(Screened(Ordered(...)))`` around them.
        evaluate: central evaluation.
        folder: where figures and checkpoints go.
        cell: name that tells workers which cell a message belongs to.
        on_round: called with each line of ``metrics.jsonl``.
    """

    scenario: Scenario
    seed: int
    strategy: Strategy
    fresh: Strategy
    grid: StreamGrid
    evaluate: Evaluate
    folder: CellFolder
    cell: str
    on_round: Callable[[dict[str, Any]], None] = lambda _: None

    def __post_init__(self) -> None:
        layers = list(_layers(self.grid))
        self.traced = next((layer for layer in layers if isinstance(layer, Traced)), None)
        self.screened = next((layer for layer in layers if isinstance(layer, Screened)), None)
        for layer in layers:
            if isinstance(layer, Screened | Ordered):
                layer.folder = self.folder.path  # what is too large to wait in memory waits beside the run
        inner = innermost(self.grid)
        self.clients = inner if isinstance(inner, ClientGrid) else None
        self.rows: list[dict[str, Any]] = []
        self.round = 0
        if self.traced:
            self.traced.on_reply = self._row

    # -- the run --------------------------------------------------------------------------------------

    def run(self, initial: ArrayRecord) -> ArrayRecord:
        """Run all rounds, from the folder's checkpoint if there is one. Returns the final arrays.

        Raises:
            RoundError: a round ended below its quorum, or would have made the model non-finite. The folder
                then holds the last complete round.
        """
        self.arrays = initial
        del initial  # or it would be held to the end of the run
        snapshot = checkpoint.load(self.folder.checkpoint)
        start = 1 if snapshot is None else snapshot.round + 1
        self.board = self.folder.tensorboard(purge_step=None if snapshot is None else start)
        try:
            if snapshot is None:
                self.folder.keep_until(-1)
                if self.clients:
                    self.clients.recall({})
            else:
                self._restore(snapshot)
            start_from = self.strategy.attach(self.evaluate) if hasattr(self.strategy, "attach") else None
            if snapshot is None:
                self.arrays = self.arrays if start_from is None else start_from
                self._first()
            self._rest()
            probed = probe_rounds(self.scenario.probe, self.scenario.rounds.count)
            for number in range(start, self.scenario.rounds.count + 1):
                self.round = number
                self._round(number, number in probed)
            if isinstance(self.strategy, Finishing) and start <= self.scenario.rounds.count + 1:
                self._last_step()
        finally:
            self.board.close()
        return self.arrays

    def _first(self) -> None:
        phases = Phases()
        central = self._central(0, phases) if self.scenario.evaluation.central_every else None
        self._finish({"round": 0, "central": central, "train": None, "federated": None, "probe": None}, phases)

    def _round(self, number: int, probed: bool) -> None:
        phases = Phases()
        messages = self._configure(number, phases)
        train = self._train(number, messages, phases)
        probe = None
        if probed and self.clients is not None and self.clients.replays:
            probe = Probe(self.clients, self.scenario.rounds.deadline_s).measure(
                messages, phases.wall, phases.cpu, sum(row["cpu_seconds"] or 0.0 for row in self.rows)
            )
        del messages  # they hold the previous model
        last = number == self.scenario.rounds.count
        evaluation = self.scenario.evaluation
        federated = central = None
        if evaluation.federated_every and (last or number % evaluation.federated_every == 0):
            federated = self._federated(number, phases)
        if evaluation.central_every and (last or number % evaluation.central_every == 0):
            central = self._central(number, phases)
        self._finish(
            {"round": number, "central": central, "train": train, "federated": federated, "probe": probe}, phases
        )

    def _last_step(self) -> None:
        """Let the strategy do what it does once, after the last round; it is written down as one round more."""
        assert isinstance(self.strategy, Finishing)
        number = self.round = self.scenario.rounds.count + 1
        phases = Phases()
        with phases("finish"), seeding.scoped(self.seed, "finish", number):
            arrays, metrics = self.strategy.finish(
                number, self.arrays, self._config(), self.grid, self.scenario.rounds.deadline_s
            )
        self._note_refused()
        arrays = records.live(arrays, like=self.arrays)
        self._check_finite(number, arrays)
        self.arrays = arrays
        federated = self._federated(number, phases) if self.scenario.evaluation.federated_every else None
        central = self._central(number, phases) if self.scenario.evaluation.central_every else None
        line = {"round": number, "central": central, "train": None, "federated": federated, "probe": None}
        self._finish({**line, "finish": _numbers(metrics)}, phases)

    # -- the parts of a round -------------------------------------------------------------------------

    def _config(self) -> ConfigRecord:
        return ConfigRecord({"num-rounds": self.scenario.rounds.count, "cell": self.cell})

    def _configure(self, number: int, phases: Phases) -> list[Message]:
        with phases("sample"), seeding.scoped(self.seed, "configure-train", number):
            return list(self.strategy.configure_train(number, self.arrays, self._config(), self.grid))

    def _train(self, number: int, messages: list[Message], phases: Phases) -> dict[str, Any] | None:
        count = Count()
        with phases("train"):
            good = count(self.grid.stream(messages, timeout=self.scenario.rounds.deadline_s))
            averaging = folding.folds(self.strategy)
            taken = folding.folded(self.strategy, good, self.folder.path) if averaging else list(good)
        self._check_quorum(number, len(messages), count)
        with phases("aggregate"), seeding.scoped(self.seed, "aggregate-train", number):
            arrays, metrics = folding.aggregate(self.strategy, number, taken)
            self._note_refused()
            if arrays is not None:
                arrays = records.live(arrays, like=self.arrays)
                self._check_finite(number, arrays)
                self.arrays = arrays
        return _numbers(metrics)

    def _check_quorum(self, number: int, cohort: int, count: Count) -> None:
        needed = math.ceil(self.scenario.rounds.quorum * cohort)
        if count.good < needed:
            reasons = "; ".join(f"client {client}: {reason}" for client, reason in count.failures[:5])
            more = f" and {len(count.failures) - 5} more" if len(count.failures) > 5 else ""
            raise RoundError(
                "quorum-missed",
                f"round {number}: {count.good} of {cohort} replies counted, {needed} were needed "
                f"(rounds.quorum {self.scenario.rounds.quorum:g}). {reasons}{more}",
            )

    def _check_finite(self, number: int, arrays: ArrayRecord) -> None:
        for name, array in arrays.items():
            if array.dtype.startswith("float") and not np.isfinite(records.view(array)).all():
                raise RoundError(
                    "model-nonfinite",
                    f"round {number}: strategy {self.scenario.strategy.name!r} made {name} non-finite from finite "
                    "replies; the model of the round before is kept",
                )

    def _federated(self, number: int, phases: Phases) -> dict[str, Any] | None:
        with phases("evaluate"):
            with seeding.scoped(self.seed, "configure-evaluate", number):
                messages = list(self.strategy.configure_evaluate(number, self.arrays, self._config(), self.grid))
            replies = list(self.grid.stream(messages, timeout=self.scenario.rounds.deadline_s))
            with seeding.scoped(self.seed, "aggregate-evaluate", number):
                return _numbers(self.strategy.aggregate_evaluate(number, replies))

    def _central(self, number: int, phases: Phases) -> dict[str, Any] | None:
        with phases("central"):
            metrics = self.evaluate(number, self.arrays)
        self._rest()
        return metrics

    def _rest(self) -> None:
        """Let the cloud's model go while clients train elsewhere, unless the strategy uses it too."""
        in_process = self.clients is not None and self.clients.in_process
        if not in_process and not hasattr(self.strategy, "attach") and hasattr(self.evaluate, "rest"):
            self.evaluate.rest()

    # -- what is kept ---------------------------------------------------------------------------------

    def _row(self, trace: ReplyTrace) -> None:
        norm, cosine = (None, None)
        if self.screened is not None:
            norm, cosine = self.screened.measured.pop(trace.message_id, (None, None))
        self.rows.append(
            {
                "round": self.round,
                "phase": trace.phase,
                "client": trace.client,
                "ok": trace.ok,
                "metrics": trace.metrics,
                "seconds": trace.seconds,
                "cpu_seconds": trace.cpu_seconds,
                "bytes_up": trace.bytes_up,
                "norm": norm,
                "cosine": cosine,
                "reason": trace.reason,
            }
        )

    def _note_refused(self) -> None:
        """Mark the rows of clients whose answers the strategy itself refused."""
        refused: dict[int, str] = getattr(self.strategy, "refused", {})
        for row in self.rows:
            if row["ok"] and row["client"] in refused:
                row |= {"ok": False, "reason": refused[row["client"]]}
        refused.clear()

    def _finish(self, line: dict[str, Any], phases: Phases) -> None:
        """Write the round down: client rows, then the checkpoint, then the line that says it is done."""
        trained = [row for row in self.rows if row["phase"] == "train"]
        failures = [row for row in self.rows if not row["ok"]]
        traffic = self.traced.take() if self.traced else None
        line |= {
            "bytes_down": traffic.bytes_down if traffic else 0,
            "bytes_up": traffic.bytes_up if traffic else 0,
            "cohort": len(trained),
            "replies": sum(row["ok"] for row in trained),
            "failures": [{key: row[key] for key in ("client", "phase", "reason")} for row in failures],
        }
        with phases("report"):
            self.folder.append("clients.jsonl", self.rows)
            self._to_board(line)
        self.rows = []
        number = line["round"]
        line |= phases.totals()
        if number % self.scenario.checkpoint.every == 0 or number >= self.scenario.rounds.count:
            with phases("checkpoint"):
                checkpoint.save(self.folder.checkpoint, self._snapshot(line), self.scenario.checkpoint.keep)
        line |= phases.totals()
        self.folder.append("metrics.jsonl", [line])
        self.on_round(line)

    def _to_board(self, line: dict[str, Any]) -> None:
        for group in ("central", "train", "federated"):
            for name, value in (line[group] or {}).items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{group}/{name}", value, line["round"])
        for name in ("bytes_up", "bytes_down", "replies"):
            self.board.add_scalar(f"round/{name}", line[name], line["round"])

    def _snapshot(self, line: dict[str, Any]) -> checkpoint.Snapshot:
        tensors, values = strategy_state.capture(self.strategy, self.fresh)
        states, changed = (self.clients.states, self.clients.changed) if self.clients else ({}, set())
        snapshot = checkpoint.Snapshot(
            round=line["round"],
            arrays=self.arrays,
            strategy=records.array_record(tensors),
            values={
                "strategy": values,
                "gate": self.screened.state() if self.screened else None,
                "grid": self.clients.remembered() if self.clients else None,
                "line": line,
            },
            clients=dict(states),
            changed=set(changed),
        )
        changed.clear()
        return snapshot

    def _restore(self, snapshot: checkpoint.Snapshot) -> None:
        self.arrays = snapshot.arrays
        tensors = {name: array.numpy() for name, array in snapshot.strategy.items()}
        strategy_state.restore(self.strategy, tensors, snapshot.values["strategy"])
        if self.screened and snapshot.values["gate"]:
            self.screened.load_state(snapshot.values["gate"])
        if self.clients:
            self.clients.states = dict(snapshot.clients)
            self.clients.changed = set()
            self.clients.recall(snapshot.values.get("grid"))
        self.folder.keep_until(snapshot.round)
        written = read_lines(self.folder.path / "metrics.jsonl")
        if not written or written[-1]["round"] < snapshot.round:
            # The process died between the checkpoint and the line; the checkpoint holds the line too.
            self.folder.append("metrics.jsonl", [snapshot.values["line"]])
        self.round = snapshot.round


@dataclass
class Count:
    """Counts replies as they pass, so that none need be held for it, and lets through those with content.

    Flower's privacy wrappers would skip a round for one error among its replies.
    """

    good: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)

    def __call__(self, replies: Iterator[Message]) -> Iterator[Message]:
        for reply in replies:
            if reply.has_error():
                self.failures.append((flower.client_of(reply.metadata.src_node_id), reply.error.reason or "no reason"))
            else:
                self.good += 1
                yield reply
            del reply  # or it would be held while the next one is made


def _layers(grid: Any) -> Iterator[Any]:
    while grid is not None:
        yield grid
        grid = getattr(grid, "inner", None)


def _numbers(metrics: MetricRecord | None) -> dict[str, Any] | None:
    return None if metrics is None else dict(metrics)
