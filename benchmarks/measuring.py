"""What the rows of the table share: a figure with its spread, short scenarios, and processes of their own."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from trellis import experiment, flower, scenario
from trellis.runs import Run, read_lines

HERE = Path(__file__).parent

NULL = """\
name: nothing
data: none
clients: {clients}
trainer: "null_trainer.py:Null"
rounds: {{count: {rounds}, clients_per_round: {cohort}}}
evaluation: {{central_every: 0, federated_every: 0}}
screening: {{allow_unchanged: true}}
probe: {{every: 0}}
runtime: {{grid: local}}
"""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: for ``--only``.
        quantity: what was measured, in words.
        unit: of all figures.
        samples: paired measures or rounds; ``value`` is their median.
        cpu: median of the same in CPU time, where that means something.
        target: the figure is meant to be at most this; ``aim`` is what would be good.
        note: what a reader needs to know beside the figure.
    """

    name: str
    quantity: str
    unit: str
    value: float
    low: float
    high: float
    samples: int
    cpu: float | None = None
    target: float | None = None
    aim: float | None = None
    note: str = ""

    @property
    def judged(self) -> float:
        """CPU time where there is any: on a shared machine it is stable where wall time is not."""
        return self.value if self.cpu is None else self.cpu

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.target is None else self.judged <= self.target


def row(name: str, quantity: str, unit: str, values: Sequence[float], **more: Any) -> Row:
    """Make a row of samples: their median and quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return Row(name, quantity, unit, median(values), low, high, len(values), **more)


@dataclass(frozen=True)
class Rounds:
    """What a run's rounds took: wall and CPU seconds of each whole round, and its lines of ``metrics.jsonl``."""

    wall: list[float]
    cpu: list[float]
    lines: list[dict[str, Any]]


@contextmanager
def started(text: str) -> Iterator[Run]:
    """Write a scenario beside the null trainer's file and start a run of it in a folder that goes away."""
    flower.quiet()
    with tempfile.TemporaryDirectory(prefix="trellis-bench-") as folder:
        path = Path(folder)
        (path / "null_trainer.py").write_text((HERE / "null_trainer.py").read_text())
        (path / "bench.yaml").write_text(text)
        yield Run.create(path / "runs", scenario.load(path / "bench.yaml"))


def run_rounds(text: str, warm: int = 3) -> Rounds:
    """Run a scenario and leave out its first rounds: first executions find cold pages."""
    moments: list[tuple[float, float]] = []

    def note(*_: Any) -> None:
        moments.append((time.perf_counter(), time.process_time()))

    with started(text) as run:
        outcome = experiment.execute(run, experiment.Hooks(on_round=note))
        for error in outcome.failed.values():
            raise error
        lines = read_lines(run.path / "cells" / "main-seed0" / "metrics.jsonl")
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(moments)]
    kept = spans[warm:]
    return Rounds([wall for wall, _ in kept], [cpu for _, cpu in kept], lines[1 + warm :])


def in_new_process(module: str, *arguments: object) -> dict[str, Any]:
    """Run ``benchmarks/<module>.py`` with arguments in a process of its own; its last line is JSON."""
    command = [sys.executable, str(HERE / f"{module}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
