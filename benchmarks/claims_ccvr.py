"""What classifier calibration gains on digits: by label skew, by the strategy underneath, and by its own options.

Ten clients, five seeds, one small perceptron. Both heads are tested on the same final extractor, so that every gain is
of the same checkpoint. Writes ``benchmarks/results/claims_ccvr.json``; prints the tables of ``docs/methods/ccvr.md``.

    python benchmarks/claims_ccvr.py [--seeds 5] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from trellis import experiment, flower, scenario
from trellis.runs import Run, environment, read_lines
from trellis.scenario import Scenario

ROOT = Path(__file__).resolve().parents[1]
SGD: dict[str, Any] = {"name": "sgd", "lr": 0.05, "local_epochs": 10, "batch_size": 32}  # the paper's local epochs
SKEWED = {"name": "dirichlet", "alpha": 0.1}
NOISE = {"clip_norm": 4.0, "delta": 1e-5}
MEASURED: dict[str, dict[str, Any]] = {}
"""Cases that are done, by their scenario: some stand in several tables."""


def partition(alpha: float) -> dict[str, Any]:
    return {"partition": {"name": "dirichlet", "alpha": alpha}}


def under(base: Any = "fedavg", trainer: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {"strategy": {"name": "ccvr", "base": base, **options}, "trainer": trainer or SGD}


TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "skew": {
        "alpha 0.05": partition(0.05),
        "alpha 0.1": partition(0.1),
        "alpha 0.5": partition(0.5),
        "IID": {"partition": {"name": "iid"}},
    },
    "base, alpha 0.1": {
        "FedAvg": {},
        "FedProx": under({"name": "fedprox", "proximal_mu": 0.1}, {**SGD, "name": "fedprox"}),
        "FedAvgM": under({"name": "fedavgm", "server_momentum": 0.5}),
        "MOON": under("fedavg", {**SGD, "name": "moon", "mu": 1.0}),
    },
    "trained for less: 3 local epochs": {
        "alpha 0.1": under(trainer={**SGD, "local_epochs": 3}),
        "IID": {"partition": {"name": "iid"}, **under(trainer={**SGD, "local_epochs": 3})},
    },
    "option, FedAvg, alpha 0.1": {
        "packed, constant": {},
        "proportional": under(allocation="proportional"),
        "low-rank 4": under(upload="low-rank", rank=4),
        "min_count 5": under(min_count=5),
        "noise 0.1": under(noise={**NOISE, "multiplier": 0.1}),
        "noise 1": under(noise={**NOISE, "multiplier": 1.0}),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "claims_ccvr.json")
    arguments = parser.parse_args()
    flower.quiet()
    started = time.perf_counter()
    rows = [
        {"table": table, "name": name, **measure(changes, arguments.seeds)}
        for table, cases in TABLES.items()
        for name, changes in cases.items()
    ]
    for table in TABLES:
        show(table, [row for row in rows if row["table"] == table])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment(), "seconds": time.perf_counter() - started, "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(changes: dict[str, Any], seeds: int) -> dict[str, Any]:
    """Run one case under all seeds and return accuracies of both heads, in points, and the bytes of the exchange."""
    each = case(changes, seeds)
    key = scenario.dump(each)
    if key not in MEASURED:
        MEASURED[key] = run(each)
    return MEASURED[key]


def case(changes: dict[str, Any], seeds: int) -> Scenario:
    """Return the scenario of one case."""
    each = scenario.from_mapping(
        {
            "name": "claims-ccvr",
            "data": "digits",
            "clients": 10,
            "partition": SKEWED,
            "model": {"name": "mlp", "hidden": [64, 32]},
            "rounds": {"count": 15},
            "evaluation": {"federated_every": 0, "central_every": 0},
            "checkpoint": {"every": 15},
            "probe": {"every": 0, "least": 0},
            "runtime": {"grid": "local"},
            "seeds": list(range(seeds)),
            **under(),
            **changes,
        }
    )
    scenario.check(each)
    return each


def run(each: Scenario) -> dict[str, Any]:
    """Run a scenario's seeds and return what ``measure`` says."""
    with tempfile.TemporaryDirectory() as folder:
        current = Run.create(Path(folder), each)
        outcome = experiment.execute(current)
        if outcome.failed:
            raise next(iter(outcome.failed.values()))
        steps = [read_lines(cell.path / "metrics.jsonl")[-1]["finish"] for _, cell in current.cells()]
    before, after = ([100 * step[f"accuracy-{when}"] for step in steps] for when in ("before", "after"))
    gains = [b - a for a, b in zip(before, after, strict=True)]
    return {
        "before": before,
        "after": after,
        "gain": gains,
        "gain_mean": statistics.mean(gains),
        "gain_sd": statistics.stdev(gains) if len(gains) > 1 else None,
        "bytes_up": statistics.mean(step["bytes-up"] for step in steps),
        "bytes_down": statistics.mean(step["bytes-down"] for step in steps),
        "epsilon": steps[0].get("epsilon"),
    }


def show(table: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n| {table} | before | after | gain | least to most | up |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        sides = [f"{statistics.mean(row[w]):.1f} ± {statistics.stdev(row[w]):.1f}" for w in ("before", "after")]
        gain = f"{row['gain_mean']:+.1f} ± {row['gain_sd']:.1f}"
        reach = f"{min(row['gain']):+.1f} to {max(row['gain']):+.1f}"
        spent = f" (epsilon {row['epsilon']:.1f})" if row["epsilon"] is not None else ""
        print(f"| {row['name']}{spent} | {' | '.join(sides)} | {gain} | {reach} | {row['bytes_up'] / 1000:.0f} kB |")


if __name__ == "__main__":
    main()
