"""Makes folders that look like a run's, for the tests of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trellis import scenario as scenarios


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(
    folder: Path,
    *,
    variants: Sequence[str] = ("fedavg", "fedprox"),
    seeds: Sequence[int] = (0, 1, 2),
    rounds: int = 5,
    clients: int = 6,
    classes: int = 3,
    metric: str = "accuracy",
    state: str = "complete",
    error: str | None = None,
    description: str = "Digits on a few clients.",
    reason: str = "update norm 14 times the median",
    lr: float = 0.1,
) -> Path:
    """Write a finished run. ``variants`` may be empty: then the cells are called ``main``."""
    folder.mkdir(parents=True)
    scenario = scenarios.from_mapping(
        {
            "name": "digits",
            "description": description,
            "data": "digits",
            "clients": clients,
            "trainer": {"name": "sgd", "lr": lr},
            "rounds": {"count": max(rounds, 1)},
            "seeds": list(seeds),
            "variants": {name: {"strategy": {"name": name}} for name in variants},
        }
    )
    (folder / "scenario.yaml").write_text(scenarios.dump(scenario))
    (folder / "environment.json").write_text(json.dumps({"started": "2026-03-04T05:06:07+00:00", "cores": 2}))
    (folder / "status.json").write_text(json.dumps({"state": state, "error": error, "finished": None}))
    for number, variant in enumerate(variants or ("main",)):
        for seed in seeds:
            _cell(folder / "cells" / f"{variant}-seed{seed}", number, seed, rounds, clients, classes, metric, reason)
    return folder


def _cell(
    cell: Path, number: int, seed: int, rounds: int, clients: int, classes: int, metric: str, reason: str
) -> None:
    cell.mkdir(parents=True)
    rng = np.random.default_rng([number, seed])
    counts = np.random.default_rng(seed).integers(0, 40, (clients, classes))
    sizes = counts.sum(axis=1).tolist()
    partition = {"classes": [str(c) for c in range(classes)], "counts": counts.tolist(), "train": sizes, "test": sizes}
    (cell / "partition.json").write_text(json.dumps(partition))
    lines, replies = [], []
    for index in range(rounds + 1):
        score = 0.9 - 0.7 * math.exp(-index / 3) + 0.02 * float(rng.normal())
        phases = {"sample": 0.001, "train": 0.5, "aggregate": 0.02, "evaluate": 0.1, "central": 0.03}
        failures = [{"client": 4, "phase": "train", "reason": reason}] if index == 2 else []
        lines.append(
            {
                "round": index,
                "central": {metric: score, "loss": 1 - score},
                "train": {"loss": 1.1 - score} if index else None,
                "federated": {metric: score - 0.1, "loss": 1.2 - score},
                "bytes_down": 1000 * clients if index else 0,
                "bytes_up": 900 * clients if index else 0,
                "seconds": 0.7,
                "cpu_seconds": 1.0,
                "phases": phases,
                "cohort": clients,
                "replies": clients - len(failures),
                "failures": failures,
                "probe": None,
            }
        )
        for client in range(clients):
            values = {metric: score - 0.01 * client, "loss": 1 - score, "num-examples": 10}
            replies.append({"round": index, "phase": "evaluate", "client": client, "ok": True, "metrics": values})
    write_lines(cell / "metrics.jsonl", lines)
    write_lines(cell / "clients.jsonl", replies)
    summary = {
        "variant": cell.name.rpartition("-seed")[0],
        "seed": seed,
        "rounds": rounds,
        "final": {"central": lines[-1]["central"], "federated": lines[-1]["federated"]},
        "sha256": f"{number}{seed}" * 32,
        "overhead": {"ratio": 1.05 + 0.01 * seed, "low": 1.0, "high": 1.2, "cpu_ratio": 1.01, "samples": 3},
        "seconds": 0.7 * rounds,
        "bytes_up": 900 * clients * rounds,
        "bytes_down": 1000 * clients * rounds,
    }
    (cell / "summary.json").write_text(json.dumps(summary))
