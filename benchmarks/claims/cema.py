"""What cloud-edge adaptation gains on digits that get worse, and what it costs the device and the link.

Every case reads the same streams with the same source and foundation models, trained once per seed. Accuracy is online:
each answer counts as given, before its batch has adapted anything. Prints the tables of ``docs/methods/cema.md``.

    python benchmarks/claims cema
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import torch
from common import Claim, Verdict, paired, spread
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from trellis import experiment, flower, scenario
from trellis.models import adaptation
from trellis.runs import Run, read_lines
from trellis_clients import batchnorm
from trellis_clients.contract import site_of

ROOT = Path(__file__).resolve().parents[2]
SCENARIO = ROOT / "scenarios" / "cloud" / "cema.yaml"
UPLOAD_ALL = ("trainer.filter=false",)
FROZEN = ("trainer.statistics=source",)
ALONE = (*FROZEN, "strategy.statistics=source", "strategy.edge_lr=0.01")

TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "methods": {
        "source": ("trainer=tta-source",),
        "prediction-time BN": ("trainer=tta-bn",),
        "Tent on the device": ("trainer=tent",),
        "EATA on the device": ("trainer=eata",),
        "CEMA, all uploaded": UPLOAD_ALL,
        "CEMA": (),
        "CEMA without distillation": ("strategy.distil=false",),
    },
    "the cloud alone (device and cloud keep the source's statistics, edge_lr 0.01)": {
        "CEMA, all uploaded": (*ALONE, *UPLOAD_ALL),
        "CEMA": ALONE,
        "CEMA without distillation": (*ALONE, "strategy.distil=false"),
        "only the device keeps them": (*FROZEN, "strategy.edge_lr=0.01"),
        "the cloud's are sent": ("trainer.statistics=cloud", "strategy.edge_lr=0.01"),
    },
    "options": {
        "separate copies": ("strategy.copies=separate",),
        "statistics at rate 0.1": ("trainer.momentum_statistics=0.1",),
        "edge_lr 0.0025": ("strategy.edge_lr=0.0025",),
        "budget 1 MB/h": ("trainer.budget_bytes_per_hour=1000000.0",),
    },
}


def measure(seeds: int = 3) -> tuple[list[Claim], list[dict[str, Any]]]:
    """Run every case of every table under seeds from 1 (seed 0 served to choose rates); the details are its rows."""
    flower.quiet()
    chosen = range(1, 1 + seeds)
    forward, backward = flops()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, experiment.torch_threads(1):
        weights = {seed: train(seed, Path(folder)) for seed in chosen}
        for table, cases in TABLES.items():
            for name, overrides in cases.items():
                runs = [measure_case(seed, overrides, weights[seed], Path(folder)) for seed in chosen]
                for each in runs:
                    each["mflop"] = (each["forwards"] * forward + each["backwards"] * backward) / each["seen"] / 1e6
                rows.append({"table": table, "name": name, "runs": runs})
            show(table, [row for row in rows if row["table"] == table])
    return judge(rows), rows


def judge(rows: list[dict[str, Any]]) -> list[Claim]:
    """Return the claims with their outcome: CEMA helps, few uploads do as well as all, and the cloud is the reason."""
    tables = list(TABLES)

    def online(table: int, name: str) -> list[float]:
        (row,) = [row for row in rows if (row["table"], row["name"]) == (tables[table], name)]
        return [100 * each["online"] for each in row["runs"]]

    def share(name: str) -> float:
        (row,) = [row for row in rows if (row["table"], row["name"]) == (tables[0], name)]
        return 100 * mean(each["share"] for each in row["runs"])

    over_source = paired(online(0, "CEMA"), online(0, "source"))
    over_all = paired(online(0, "CEMA"), online(0, "CEMA, all uploaded"))
    over_statistics = paired(online(0, "CEMA"), online(0, "prediction-time BN"))
    alone = paired(online(1, "CEMA"), online(0, "source"))
    clear: Verdict = "held" if mean(over_statistics) > stdev(over_statistics) else "in part"
    return [
        Claim(
            "adaptation in the cloud raises online accuracy on corrupted streams",
            "source model, no adaptation",
            f"{spread(over_source, sign=True)} points; over prediction-time batch norm "
            f"{spread(over_statistics, sign=True)}; without batch statistics anywhere {spread(alone, sign=True)}",
            clear if mean(over_source) > stdev(over_source) else "not held",
            "" if clear == "held" else "Batch statistics, which take no cloud, give almost all of it here.",
        ),
        Claim(
            "filtered uploads do as well as uploading everything (within 1 point)",
            "all samples uploaded",
            f"{spread(over_all, sign=True)} points with {share('CEMA'):.0f} % uploaded",
            "held" if mean(over_all) > -1 else "not held",
        ),
    ]


def train(seed: int, folder: Path) -> list[str]:
    """Train source and foundation as the strategy does; return the overrides that make every case read them."""
    site = site_of(SCENARIO, (), seed)
    server = experiment.app_module("server")
    strategy = server.build_strategy(site.scenario, site.federation.num_clients, seed)
    strategy.attach(SimpleNamespace(site=site))
    models = {"source": strategy.cloud.source, "foundation": strategy.cloud.make_foundation()}
    overrides = []
    for name, model in models.items():
        path = folder / f"{name}-{seed}.safetensors"
        save_file({key: values.contiguous() for key, values in model.state_dict().items()}, path)
        overrides.append(f"strategy.{name}_weights={path}")
    return overrides


def measure_case(seed: int, overrides: tuple[str, ...], weights: list[str], folder: Path) -> dict[str, Any]:
    """Run one case under one seed."""
    base = [
        "variants={}",
        f"seeds=[{seed}]",
        "runtime.grid=local",
        "checkpoint.every=1000",
        "evaluation.central_every=30",
    ]
    stream = json.dumps(scenario.plain(scenario.read(SCENARIO))["trainer"]["stream"])
    loaded = scenario.load(SCENARIO, [*base, *weights, *overrides, f"trainer.stream={stream}"])
    run = Run.create(folder, loaded)
    outcome = experiment.execute(run)
    assert not outcome.failed, outcome.failed
    lines = read_lines(run.path / "cells" / f"main-seed{seed}" / "metrics.jsonl")
    trains = [line["train"] for line in lines[1:]]
    totals = {key: sum(t[key] for t in trains) for key in ("seen", "uploaded", "upload-bytes", "forwards", "backwards")}
    return {
        **totals,
        "online": trains[-1]["accuracy"],
        "by round": [t["round-accuracy"] for t in trains],
        "share": trains[-1]["upload-share"],
        "down": sum(line["bytes_down"] for line in lines[2:]) / max(len(lines) - 2, 1),  # after the source model
        "clean": lines[-1]["central"]["accuracy"],
        "cloud-steps": sum(t["cloud-steps"] for t in trains),
    }


def flops() -> tuple[float, float]:
    """Return the device model's floating-point operations per image: forward, and backward to the affine parameters."""
    site = site_of(SCENARIO)
    x = torch.randn(32, *site.trainer.task.shape)
    counts = []
    for grad in (False, True):
        with FlopCounterMode(display=False) as counter, batchnorm.batch_statistics(site.model.eval()):
            with torch.set_grad_enabled(grad):
                loss = adaptation.entropy(site.model(x)).mean()
            if grad:
                loss.backward()
        counts.append(counter.get_total_flops() / len(x))
    return counts[0], counts[1] - counts[0]


def show(table: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{table}\n")
    print("| case | online accuracy | uploaded | kB up per 1000 | B down per round | MFLOP per image | clean |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        runs = row["runs"]

        def over(key: str, runs: list[dict[str, Any]] = runs) -> float:
            return mean(each[key] for each in runs)

        spread = stdev(each["online"] for each in runs) if len(runs) > 1 else 0.0
        up = mean(each["upload-bytes"] / each["seen"] for each in runs)
        cells = [
            f"{100 * over('online'):.1f} ± {100 * spread:.1f}",
            f"{100 * over('share'):.0f} %",
            f"{up:.0f}",
            f"{over('down'):.0f}",
            f"{over('mflop'):.2f}",
            f"{100 * over('clean'):.1f}",
        ]
        print(f"| {row['name']} | {' | '.join(cells)} |")
