"""What a round costs when its clients do nothing: in this process, on Ray, and in large federations."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from statistics import linear_regression, median
from typing import Any

import numpy as np
import psutil
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from measuring import HERE, NULL, Row, in_new_process, row, run_rounds

from trellis import experiment, flower, records, safe_yaml, scenario
from trellis.grids.base import ClientGrid, StreamGrid
from trellis.grids.local import LocalGrid
from trellis.scenario import Scenario

COHORT = 20
FEW, MANY = 100, 100_000


def empty(quick: bool) -> Iterator[Row]:
    """The fixed cost: round time over 1, 2, 4, ... clients, extended to none."""
    repeats, rounds = (1, 8) if quick else (3, 30)
    sizes = (1, 4) if quick else (1, 2, 4, 8, 16)
    for name, quantity, more in (
        ("empty-round", "fixed cost of a round, checkpoint every round", ""),
        ("empty-round-unsaved", "fixed cost of a round without a checkpoint", "checkpoint: {every: 1000000}\n"),
    ):
        found = [_line(sizes, rounds, more) for _ in range(repeats)]
        note = f"and {median(slope for _, _, slope in found):.2f} ms CPU a client"
        cpu = median(cpu for _, cpu, _ in found)
        yield row(name, quantity, "ms", [wall for wall, _, _ in found], cpu=cpu, target=5.0, aim=1.0, note=note)


def _line(sizes: tuple[int, ...], rounds: int, more: str) -> tuple[float, float, float]:
    """Return the intercepts of wall and CPU milliseconds over the cohort's size, and CPU's slope."""
    wall, cpu = [], []
    for size in sizes:
        measured = run_rounds(NULL.format(clients=size, cohort=size, rounds=rounds) + more)
        wall.append(1000 * median(measured.wall))
        cpu.append(1000 * median(measured.cpu))
    fitted = linear_regression(sizes, cpu)
    return linear_regression(sizes, wall).intercept, fitted.intercept, fitted.slope


def ray(quick: bool) -> Iterator[Row]:
    """The same messages through ``LocalGrid`` and ``RayGrid`` in turn; their difference per client."""
    from trellis.grids.ray import RayGrid

    clients, repeats = (8, 5) if quick else (60, 40)
    each = _scenario(NULL.format(clients=clients, cohort=clients, rounds=1))
    client = experiment.app_module("client")
    cells = {"bench": client.Cell(scenario.plain(each), 0)}
    sites = client.Sites(cells)
    local = LocalGrid(client.make_app(sites=sites), clients)
    arrays = client.Evaluator(sites, "bench").initial()
    for workers in (1, 2):
        with RayGrid(client.AppFactory(cells), clients, workers=workers) as grid:
            extra, cpu = [], []
            for number in range(repeats + 3):
                (here, here_cpu), (there, there_cpu) = (_pass(g, each, arrays, number, clients) for g in (local, grid))
                if number >= 3:
                    extra.append(1000 * (there - here) / clients)
                    cpu.append(1000 * (there_cpu - here_cpu) / clients)
        quantity = f"Ray's extra per client, {workers} worker{'s' * (workers > 1)}"
        note = f"wall; {median(cpu):.2f} ms CPU in the driver and the clients' turns together"
        yield row(f"ray-{workers}", quantity, "ms", extra, target=2.0, aim=0.5, note=note)


def _pass(grid: StreamGrid, each: Scenario, arrays: ArrayRecord, number: int, clients: int) -> tuple[float, float]:
    """Send one round's messages through all layers. Returns wall seconds, and the CPU seconds of driver and clients."""
    server = experiment.app_module("server")
    layers = server.layered(grid, each, server.build_strategy(each, clients, 0))
    config = ConfigRecord({"server-round": number, "num-rounds": 1, "cell": "bench"})
    content = RecordDict({records.ARRAYS: arrays, records.CONFIG: config})
    messages = [Message(content, flower.node_of(client), "train") for client in range(clients)]
    theirs = 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    for reply in layers.stream(messages):
        assert not reply.has_error(), reply.error
        theirs += float(records.config_record(reply.content, records.TIMING)["cpu_seconds"])  # type: ignore[arg-type]
        del reply
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu if isinstance(grid, LocalGrid) else cpu + theirs


class Sink(ClientGrid):
    """Clients that never get to work: it takes the messages, notes when, and answers each with an error."""

    taken_at = taken_cpu = 0.0

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:  # noqa: ARG002
        taken = flower.number(messages)
        self.taken_at, self.taken_cpu = time.perf_counter(), time.process_time()
        for message in taken:
            yield flower.failure(message, flower.FAILED_CLIENT, "nobody is there")


def dispatch(quick: bool) -> Iterator[Row]:
    """From the start of sampling to the moment when the innermost grid holds the round's messages."""
    flower.quiet()
    registered, cohort = 10_000, 100
    each = _scenario(NULL.format(clients=registered, cohort=cohort, rounds=1))
    server, grid = experiment.app_module("server"), Sink(registered)
    strategy = server.build_strategy(each, registered, 0)
    layers = server.layered(grid, each, strategy)
    arrays = records.array_record({"weight": np.zeros((1000, 100), np.float32)})
    took, cpu = [], []
    for number in range(1, 8 if quick else 60):
        wall, process = time.perf_counter(), time.process_time()
        messages = list(strategy.configure_train(number, arrays, ConfigRecord({"num-rounds": 100}), grid))
        for _ in layers.stream(messages):
            pass
        took.append(1000 * (grid.taken_at - wall))
        cpu.append(1000 * (grid.taken_cpu - process))
    quantity = f"sampling and dispatch, {cohort} of {registered} clients"
    yield row("dispatch", quantity, "ms", took[3:], cpu=median(cpu[3:]), target=50.0, aim=5.0)


def growth(quick: bool) -> Iterator[Row]:
    """A hundred clients against a hundred thousand, each in a process of its own, in turn."""
    repeats, rounds = (1, 8) if quick else (5, 40)
    pairs = [[in_new_process("rounds", clients, rounds) for clients in (FEW, MANY)] for _ in range(repeats)]
    span = f"from {FEW} to {MANY} registered, cohort {COHORT}"
    wall, cpu, memory = (
        [100 * (many[key] / few[key] - 1) for few, many in pairs] for key in ("wall_s", "cpu_s", "rss_mb")
    )
    few = median(few["cpu_s"] for few, _ in pairs)
    note = f"of {1000 * few:.1f} ms CPU"
    yield row("growth-time", f"growth of round time {span}", "%", wall, cpu=median(cpu), target=10.0, note=note)
    note = f"of {median(few['rss_mb'] for few, _ in pairs):.0f} MB resident"
    yield row("growth-memory", f"growth of driver memory {span}", "%", memory, target=10.0, note=note)
    added = [many["added_mb"] - few["added_mb"] for few, many in pairs]
    yield row("growth-added", f"memory added by the run, {span}", "MB", added, note="above the imports")


def _scenario(text: str) -> Scenario:
    parsed: dict[str, Any] = safe_yaml.parse(text, "benchmark")
    return scenario.from_mapping({**parsed, "base": str(HERE)})


def _resident_mb() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


def _one(clients: int, rounds: int) -> dict[str, float]:
    """Run a federation of this size in this process; say what its rounds took and what it holds at the end."""
    run_rounds(NULL.format(clients=2, cohort=2, rounds=2))  # imports and first executions
    before = _resident_mb()
    found = run_rounds(NULL.format(clients=clients, cohort=COHORT, rounds=rounds))
    after = _resident_mb()
    return {
        "wall_s": median(found.wall),
        "cpu_s": median(found.cpu),
        "rss_mb": after,
        "added_mb": after - before,
    }


if __name__ == "__main__":
    print(json.dumps(_one(int(sys.argv[1]), int(sys.argv[2]))))
