"""Time a round of the same federation on Trellis's own grids and on Flower's own simulation.

    python benchmarks/flower_simulation.py [--rounds 40] [--repeats 3]

Ten clients, a perceptron of one hidden layer of 16 on 1,797 digits, every client trains one epoch and evaluates in
every round. The client code, the data, the arithmetic and the cores are the same in all four arms:

- ``trellis run`` with ``runtime.grid: ray``, one worker per core;
- ``trellis run`` with ``runtime.grid: local``: one process, one core, for clients too short to be worth a worker;
- ``flwr run``, Trellis's server: the same two apps under Flower's simulation engine (Ray too, one CPU per client);
- ``flwr run``, Flower's server: as before, but the rounds are those of Flower's own ``FedAvg.start``.

Each arm runs in processes of its own. What counts is the time between the ends of two rounds, after the first ones
and before the last, so that neither start-up nor shut-down is in it; beside it, the CPU seconds of all processes of
the arm in that time. Arms take turns within a repeat. Screening and checkpoints, which Flower's server has not, are
on in the other three. Ratios are those of each arm's seconds to the Ray grid's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

from flower_runtime import MARK, Flower, marked  # noqa: E402
from trellis.runs import environment, write_json  # noqa: E402

CLIENTS = 10
WARM_UP = 3
"""Rounds before the measured ones: the first of them wait for workers, imports and data."""

SCENARIO = """\
name: bench
data: digits
clients: 10
partition: {{name: dirichlet, alpha: 0.5}}
model: {{name: mlp, hidden: [16]}}
trainer: {{name: sgd, lr: 0.1, batch_size: 32}}
rounds: {{count: {rounds}}}
probe: {{every: 0, least: 0}}
"""

PYPROJECT = """\
[project]
name = "trellis-bench"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "trellis"
[tool.flwr.app.components]
serverapp = "{server}"
clientapp = "trellis_clients.app:app"
[tool.flwr.app.config]
scenario = "scenario.yaml"
runs = "runs"
"""

# Rounds by Flower alone. Arrays to start from and the central evaluation are the scenario's, as in the other arms.
SERVER = """\
import json
from pathlib import Path

from flwr.app import MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from trellis import flower_app, scenario
from trellis_clients.app import Cell, Evaluator, Sites

app = ServerApp()


@app.main()
def main(grid, context):
    each = flower_app.read(context.run_config)
    evaluator = Evaluator(Sites({"main": Cell(scenario.plain(each), each.seeds[0])}), "main")
    folder = Path(context.run_config["runs"]) / "bench" / "plain" / "cells" / "main-seed0"
    folder.mkdir(parents=True)

    def evaluate(number, arrays):
        metrics = evaluator(number, arrays)
        with (folder / "metrics.jsonl").open("a") as out:
            out.write(json.dumps({"round": number, "central": metrics}) + "\\n")
        return MetricRecord(metrics)

    FedAvg().start(grid, evaluator.initial(), num_rounds=each.rounds.count, evaluate_fn=evaluate)
"""


@dataclass(frozen=True)
class Sample:
    """Seconds per round, on the wall and of all CPUs together, and what the model was worth at the end."""

    wall_s: float
    cpu_s: float
    central_loss: float


class Watch:
    """Notes when rounds end, and the CPU seconds of an arm's processes at the two ends of the measured window."""

    def __init__(self, runs: Path, mark: str, rounds: int) -> None:
        self.runs, self.mark = runs, mark
        self.first, self.last = WARM_UP, rounds - 1
        self.stamps: dict[int, tuple[float, float]] = {}
        self.over = threading.Event()

    def __call__(self) -> None:
        living: list[psutil.Process] = []
        while not self.over.wait(0.004):
            ended = self._ended()
            if ended >= self.first and self.first not in self.stamps:
                now = time.perf_counter()
                living = marked(self.mark)
                self.first = ended
                self.stamps[ended] = now, cpu_seconds(living)
            if ended >= self.last:
                self.stamps[ended] = time.perf_counter(), cpu_seconds(living)
                return

    def _ended(self) -> int:
        """Return the number of the last round that is written down."""
        for path in self.runs.glob("bench/*/cells/main-seed0/metrics.jsonl"):
            return path.read_bytes().count(b"\n") - 1
        return -1

    def sample(self, loss: float) -> Sample:
        (first, (wall, cpu)), (last, (wall_end, cpu_end)) = sorted(self.stamps.items())
        return Sample((wall_end - wall) / (last - first), (cpu_end - cpu) / (last - first), loss)


def cpu_seconds(processes: list[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def measured(runs: Path, mark: str, rounds: int, run: Callable[[], None]) -> Sample:
    watch = Watch(runs, mark, rounds)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        watch.over.set()
        thread.join()
    (path,) = runs.glob("bench/*/cells/main-seed0/metrics.jsonl")
    return watch.sample(json.loads(path.read_text().splitlines()[-1])["central"]["loss"])


def with_trellis(folder: Path, rounds: int, grid: str) -> Sample:
    """Run the scenario by ``trellis run``."""
    (folder / "scenario.yaml").write_text(SCENARIO.format(rounds=rounds))
    mark = uuid.uuid4().hex
    command = [str(Path(sys.executable).parent / "trellis"), "run", str(folder / "scenario.yaml"), "--quiet"]
    command += ["--runs", str(folder / "runs"), "--set", f"runtime.grid={grid}"]
    return measured(
        folder / "runs", mark, rounds, lambda: done(subprocess.run(command, env=os.environ | {MARK: mark}, **CAPTURED))
    )


def with_flower(folder: Path, rounds: int, server: str) -> Sample:
    """Run the scenario by ``flwr run``, with the server app that ``server`` names."""
    app = folder / "app"
    app.mkdir()
    (app / "scenario.yaml").write_text(SCENARIO.format(rounds=rounds))
    (app / "pyproject.toml").write_text(PYPROJECT.format(server=server))
    (app / "server.py").write_text(SERVER)
    flower = Flower(folder / "home")
    try:
        return measured(
            folder / "runs",
            flower.mark,
            rounds,
            lambda: done(flower.run(app, CLIENTS, f"runs='{folder / 'runs'}'", timeout=600)),
        )
    finally:
        flower.stop()


CAPTURED = {"capture_output": True, "text": True, "timeout": 600, "check": False}


def done(result: subprocess.CompletedProcess[str]) -> None:
    if result.returncode:
        raise SystemExit(result.stdout + result.stderr)


ARMS: dict[str, Callable[[Path, int], Sample]] = {
    "trellis run, grid ray": lambda folder, rounds: with_trellis(folder, rounds, "ray"),
    "trellis run, grid local": lambda folder, rounds: with_trellis(folder, rounds, "local"),
    "flwr run, Trellis's server": lambda folder, rounds: with_flower(folder, rounds, "trellis_server.app:app"),
    "flwr run, Flower's FedAvg": lambda folder, rounds: with_flower(folder, rounds, "server:app"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    assert arguments.rounds > WARM_UP + 1, "no round would be left to measure"
    samples: dict[str, list[Sample]] = {name: [] for name in ARMS}
    for repeat in range(arguments.repeats):
        for name, arm in ARMS.items():
            with tempfile.TemporaryDirectory() as folder:
                samples[name].append(arm(Path(folder), arguments.rounds))
            latest = samples[name][-1]
            print(f"# {repeat + 1}/{arguments.repeats} {name}: {latest}", file=sys.stderr, flush=True)
    table = {name: row(each, samples["trellis run, grid ray"]) for name, each in samples.items()}
    print(f"{'seconds per round':28} {'wall':>8} {'(low-high)':>17} {'CPU':>8} {'wall ratio':>11} {'CPU ratio':>10}")
    for name, each in table.items():
        low, high = each["wall_s_range"]
        print(
            f"{name:28} {each['wall_s']:8.4f} {f'({low:.4f}-{high:.4f})':>17} {each['cpu_s']:8.4f} "
            f"{each['wall_ratio']:10.2f}x {each['cpu_ratio']:9.2f}x"
        )
    results = ROOT / "benchmarks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    said = {key: value for key, value in environment().items() if key != "argv"}
    write_json(
        results / "flower_simulation.json",
        {"rounds": arguments.rounds, "clients": CLIENTS, "environment": said, "arms": table},
    )


def row(each: list[Sample], base: list[Sample]) -> dict[str, object]:
    """Summarise an arm. Ratios are those within a repeat, where the machine was most alike; the median of them."""
    walls = [sample.wall_s for sample in each]
    return {
        "wall_s": statistics.median(walls),
        "wall_s_range": [min(walls), max(walls)],
        "cpu_s": statistics.median(sample.cpu_s for sample in each),
        "wall_ratio": statistics.median(own.wall_s / other.wall_s for own, other in zip(each, base, strict=True)),
        "cpu_ratio": statistics.median(own.cpu_s / other.cpu_s for own, other in zip(each, base, strict=True)),
        "central_loss": [sample.central_loss for sample in each],
    }


if __name__ == "__main__":
    main()
