"""Small real scenarios that the end-to-end tests run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trellis import experiment, flower, scenario
from trellis.runs import Run, read_lines

DIGITS = """\
name: digits
data: digits
clients: 6
partition: {name: dirichlet, alpha: 0.5}
model: {name: mlp, hidden: [16]}
trainer: {name: sgd, lr: 0.1, batch_size: 32}
rounds: {count: 4, clients_per_round: 4}
runtime: {grid: local}
"""


def write(folder: Path, text: str = DIGITS, name: str = "digits.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def run(folder: Path, overrides: tuple[str, ...] = (), text: str = DIGITS, **hooks: Any) -> tuple[Run, Any]:
    """Run a scenario and return its folder and outcome."""
    flower.quiet()
    loaded = scenario.load(write(folder, text), overrides)
    current = Run.create(folder / "runs", loaded)
    return current, experiment.execute(current, experiment.Hooks(**hooks))


def sha(folder: Path, overrides: tuple[str, ...] = (), text: str = DIGITS) -> str:
    """Return the SHA-256 of the final weights of a scenario's first cell."""
    _, outcome = run(folder, overrides, text)
    assert not outcome.failed, outcome.failed
    return str(outcome.summaries[0]["sha256"])


def lines(current: Run, file: str = "metrics.jsonl", cell: str = "main-seed0") -> list[dict[str, Any]]:
    return read_lines(current.path / "cells" / cell / file)
