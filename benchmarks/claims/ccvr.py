"""What classifier calibration gains on digits: by label skew, by the strategy underneath, and by its own options.

Ten clients, five seeds, one small perceptron. Both heads are tested on the same final extractor, so that every gain is
of the same checkpoint. Prints the tables of ``docs/methods/ccvr.md``.

    python benchmarks/claims ccvr
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import Claim, Verdict, spread

from trellis import experiment, flower, scenario
from trellis.runs import Run, read_lines
from trellis.scenario import Scenario

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


def measure(seeds: int = 5) -> tuple[list[Claim], list[dict[str, Any]]]:
    """Run every case of every table; the details are its rows."""
    flower.quiet()
    rows = [
        {"table": table, "name": name, **measure_case(changes, seeds)}
        for table, cases in TABLES.items()
        for name, changes in cases.items()
    ]
    for table in TABLES:
        show(table, [row for row in rows if row["table"] == table])
    return judge(rows), rows


def judge(rows: list[dict[str, Any]]) -> list[Claim]:
    """Return the claims with their outcome.

    Calibration gains where labels are skewed, and more with more skew (the paper's table 2), and IID it does no harm.
    """
    gains = {row["name"]: row["gain"] for row in rows if row["table"] == "skew"}
    short = {row["name"]: row["gain"] for row in rows if row["table"].startswith("trained for less")}
    means = {name: statistics.mean(values) for name, values in gains.items()}
    clear = means["alpha 0.1"] > statistics.stdev(gains["alpha 0.1"])
    ordered = means["alpha 0.05"] > means["alpha 0.1"] > means["alpha 0.5"]
    skewed: Verdict = "held" if clear and ordered else "in part" if clear else "not held"
    unharmed = abs(means["IID"]) <= 1
    figures = "; ".join(f"{name} {spread(values, sign=True)}" for name, values in gains.items())
    caveat = f"After 3 local epochs instead of 10 the gain without skew is {statistics.mean(short['IID']):+.1f}."
    return [
        Claim(
            "calibrating the head raises accuracy under label skew, more with more skew",
            "the same checkpoint's own head",
            f"{figures} points, {len(gains['IID'])} seeds",
            skewed,
        ),
        Claim(
            "without skew it changes little (within 1 point)",
            "the same checkpoint's own head",
            f"{spread(gains['IID'], sign=True)} points",
            "held" if unharmed else "not held",
            caveat,
        ),
    ]


def measure_case(changes: dict[str, Any], seeds: int) -> dict[str, Any]:
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
    """Run a scenario's seeds and return what ``measure_case`` says."""
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
