"""What the claims of SAM, ESAM, SAF and MESA share: one federation, and how sharp its models are at the end.

Ten clients, digits under Dirichlet 0.1, FedAvg over twenty rounds of two local epochs, everybody in every round. The
sharpness of the global model is of the mean loss on all clients' training examples together; that of a local model, of
one more turn of each client from the final global model, of the client's own training examples. Eigenvalues and rises
are in double precision.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from common import Cell, Claim, Verdict, compare, paired, spread
from torch import nn
from torch.nn import functional as F

from trellis import records, scenario, seeding
from trellis.data.base import Split
from trellis.experiment import torch_threads
from trellis.models.sharpness import loss_rise, top_eigenvalue
from trellis.runs import CellFolder
from trellis.scenario import Scenario
from trellis_clients import client_state
from trellis_clients.site import Cell as SiteCell
from trellis_clients.site import Site
from trellis_clients.trainer import Turn
from trellis_server import checkpoint

STEP_TIMES = Path(__file__).resolve().parents[1] / "results" / "sharpness_step_time.json"
JUDGED = "resnet-8"
"""The model whose step time is judged: on the smaller ones Python and torch's dispatch are most of a step."""

COMMON: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "local_epochs": 2, "batch_size": 32}
FEDERATION: dict[str, Any] = {
    "data": "digits",
    "clients": 10,
    "partition": {"name": "dirichlet", "alpha": 0.1},
    "model": {"name": "mlp", "hidden": [64, 32]},
    "rounds": {"count": 20},
    "evaluation": {"federated_every": 0},
}
MEASURES = ("accuracy", "loss", "eigenvalue", "rise", "far_rise", "local_eigenvalue", "local_rise", "drift")


def trainer(name: str, **settings: Any) -> dict[str, Any]:
    return {"trainer": {"name": name, **COMMON, **settings}}


@cache
def _run(variant: str, changes: str, seeds: int) -> list[dict[str, float]]:
    """Run one variant once a process, however many papers compare with it."""
    cells = compare(FEDERATION, {variant: json.loads(changes)}, range(seeds), also=sharpness)
    return [figures(cell) for cell in cells[variant]]


def run(variants: Mapping[str, Mapping[str, Any]], seeds: int) -> dict[str, list[dict[str, float]]]:
    """Return what was measured of every variant, a dictionary of ``MEASURES`` for each seed."""
    results = {name: _run(name, json.dumps(changes, sort_keys=True), seeds) for name, changes in variants.items()}
    for name, rows in results.items():
        print(f"{name:16}", "  ".join(f"{key} {spread(values(rows, key), 3)}" for key in MEASURES), flush=True)
    return results


def figures(cell: Cell) -> dict[str, float]:
    return {"accuracy": 100 * cell.last("central", "accuracy"), **cell.extra}


def sharpness(each: Scenario, place: CellFolder) -> dict[str, Any]:
    """Return the sharpness of a finished cell's global model, and the mean of its clients' local ones."""
    snapshot = checkpoint.load(place.checkpoint)
    assert snapshot is not None
    site = Site(SiteCell(scenario.plain(each), place.seed))
    federation = site.federation
    arrays = {name: torch.from_numpy(array.numpy().copy()) for name, array in snapshot.arrays.items()}
    site.load(arrays, {})
    start = copy.deepcopy(site.model)
    everything = federation.data.train.subset(torch.from_numpy(np.concatenate(federation.parts)))
    found = of_model(start, everything, far=True)
    local = []
    for client in range(federation.num_clients):
        state = client_state.unpack(snapshot.clients[client]) if client in snapshot.clients else {}
        number = each.rounds.count + 1
        generator = seeding.torch_generator(place.seed, "train", number, client)
        turn = Turn(number, number, client, federation.num_clients, generator, received={records.ARRAYS: arrays})
        data = federation.client(client)
        with seeding.scoped(place.seed, "train", number, client, "global"):
            site.load(arrays, state)
            site.trainer.fit(site.model, data, state, turn)
        own = of_model(site.model, data.train)
        moved = zip(site.model.parameters(), start.parameters(), strict=True)
        own["drift"] = math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in moved))
        local.append((len(data.train), own))
    examples = sum(count for count, _ in local)
    for key, name in (("eigenvalue", "local_eigenvalue"), ("rise", "local_rise"), ("drift", "drift")):
        found[name] = sum(count * own[key] for count, own in local) / examples
    return found


def of_model(model: nn.Module, split: Split, far: bool = False) -> dict[str, float]:
    """Return mean loss, top eigenvalue and loss rise of a model on a split's examples.

    ``rise`` is SAM's first-order measure at radius 0.1, ``far_rise`` the largest on ten ascent steps within 0.5.
    """
    batch = split.batch(torch.arange(len(split)))
    x, y = batch.x.double(), batch.y
    model = copy.deepcopy(model).double()

    def objective(m: nn.Module) -> torch.Tensor:
        return F.cross_entropy(m(x), y)

    found = {
        "loss": float(objective(model).detach()),
        "eigenvalue": top_eigenvalue(model, objective, 1e-3),
        "rise": loss_rise(model, objective, 0.1),
    }
    return {**found, "far_rise": loss_rise(model, objective, 0.5, steps=10)} if far else found


def values(rows: list[dict[str, float]], key: str) -> list[float]:
    return [row[key] for row in rows]


# -- label noise, without a federation ---------------------------------------------------------------------

NOISE = 0.3
"""Share of the training labels that are drawn anew, evenly over the ten classes."""
ALONE: dict[str, Any] = {
    "name": "noise",
    "data": "digits",
    "clients": 1,
    "partition": {"name": "iid", "test_fraction": 0.0},
    "model": {"name": "mlp", "hidden": [128, 128]},
    "runtime": {"grid": "local"},
}


@cache
def _noisy(changes: str, seeds: int) -> list[dict[str, float]]:
    settings = {"lr": 0.05, "momentum": 0.9, "local_epochs": 40, "batch_size": 64, **json.loads(changes)}
    results = []
    for seed in range(seeds):
        site = Site(SiteCell(scenario.plain(scenario.from_mapping({**ALONE, "trainer": settings})), seed))
        data, generator = site.federation.client(0), seeding.torch_generator(seed, "noise")
        y = data.train.fields["y"].clone()
        wrong = torch.rand(len(y), generator=generator) < NOISE
        y[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=generator)
        noisy = replace(data, train=replace(data.train, fields={**data.train.fields, "y": y}))
        arrays = {name: values.clone() for name, values in site.trainer.shared(site.model).items()}
        turn = Turn(1, 1, 0, 1, seeding.torch_generator(seed), received={records.ARRAYS: arrays})
        with torch_threads(1), seeding.scoped(seed, "noise"):
            site.trainer.fit(site.model, noisy, {}, turn)
            accuracy = site.trainer.evaluate(site.model, site.federation.data.test, turn)["accuracy"]
        results.append({"accuracy": 100 * accuracy, **of_model(site.model, noisy.train)})
    return results


def under_noise(variants: Mapping[str, Mapping[str, Any]], seeds: int) -> dict[str, list[dict[str, float]]]:
    """Train on all digits in one place with wrong labels; accuracy is on clean digits, sharpness on the noisy ones.

    Overfitting is what costs accuracy here, which it does not in the federation above.
    """
    results = {name: _noisy(json.dumps(changes, sort_keys=True), seeds) for name, changes in variants.items()}
    for name, rows in results.items():
        print(f"{name:16}", "  ".join(f"{key} {spread(values(rows, key), 3)}" for key in rows[0]), flush=True)
    return results


def robust(rows: dict[str, list[dict[str, float]]], ours: str, bound: float) -> Claim:
    """Return the claim on label noise: a lower rise and a point of accuracy; other settings stand beside it."""

    def gains(name: str) -> list[float]:
        return paired(values(rows[name], "accuracy"), values(rows["sgd"], "accuracy"))

    def ratios(name: str) -> list[float]:
        return [a / b for a, b in zip(values(rows[name], "rise"), values(rows["sgd"], "rise"), strict=True)]

    met = [mean(gains(ours)) >= 1, mean(ratios(ours)) <= bound]
    held: Verdict = "held" if all(met) else "in part" if any(met) else "not held"
    others = [name for name in rows if name not in ("sgd", ours)]
    beside = "; ".join(f"{name} {spread(gains(name), sign=True)}, {spread(ratios(name), 2)}" for name in others)
    return Claim(
        f"with {NOISE:.0%} wrong labels, in one place: 1 point more on clean test digits "
        f"and a rise at most {bound} of SGD's",
        f"SGD {spread(values(rows['sgd'], 'accuracy'))} %, {spread(values(rows['sgd'], 'rise'), 3)}",
        f"{spread(gains(ours), sign=True)} points, ratio {spread(ratios(ours), 2)}",
        held,
        f"{beside[0].upper()}{beside[1:]}." if beside else "",
    )


# -- claims --------------------------------------------------------------------------------------------------


def flatter(ours: list[dict[str, float]], sgd: list[dict[str, float]], bound: float, finding: str = "") -> Claim:
    """Return the claim that training ends at most ``bound`` times as sharp as SGD, by both measures."""
    ratios = {key: [a / b for a, b in zip(values(ours, key), values(sgd, key), strict=True)] for key in SHARP}
    lower = all(mean(ratio) + 2 * stdev(ratio) / math.sqrt(len(ratio)) < 1 for ratio in ratios.values())
    held: Verdict = "held" if all(mean(r) <= bound for r in ratios.values()) else "in part" if lower else "not held"
    return Claim(
        f"ends flatter: top Hessian eigenvalue and loss rise (radius 0.1) at most {bound} of SGD's",
        f"SGD: {spread(values(sgd, 'eigenvalue'), 2)} and {spread(values(sgd, 'rise'), 3)}",
        f"{spread(values(ours, 'eigenvalue'), 2)} and {spread(values(ours, 'rise'), 3)}; "
        f"ratios {spread(ratios['eigenvalue'], 2)} and {spread(ratios['rise'], 2)}",
        held,
        finding,
    )


SHARP = ("eigenvalue", "rise")


def more_accurate(ours: list[dict[str, float]], sgd: list[dict[str, float]], finding: str = "") -> Claim:
    """Return the claim that test accuracy is higher than SGD's, by more than two standard errors of the difference."""
    gains = paired(values(ours, "accuracy"), values(sgd, "accuracy"))
    error = stdev(gains) / math.sqrt(len(gains))
    held: Verdict = "held" if mean(gains) > 2 * error else "not held"
    if abs(mean(gains)) <= 2 * error:
        finding = f"No difference beyond the spread. {finding}".strip()
    return Claim(
        "higher test accuracy than SGD",
        f"SGD {spread(values(sgd, 'accuracy'))} %",
        f"{spread(gains, sign=True)} points, {len(gains)} seeds",
        held,
        finding,
    )


def step_time(name: str, at_most: float, text: str, at_least: float = 0.0, finding: str = "") -> Claim:
    """Return the claim on the time of a step, from the stored figures of ``benchmarks/sharpness_step_time.py``.

    Held within the limits; in part below SAM's.
    """
    if not STEP_TIMES.is_file():
        sys.exit(f"{STEP_TIMES} is missing: run python benchmarks/sharpness_step_time.py first")
    ratios = {row["name"]: row["cpu"] for row in json.loads(STEP_TIMES.read_text())["rows"]}
    ratio = ratios[f"{JUDGED}-{name}"]
    cheaper = name != "sam" and ratio < ratios[f"{JUDGED}-sam"]
    held: Verdict = "held" if at_least <= ratio <= at_most else "in part" if cheaper else "not held"
    rest = ", ".join(f"{model} {ratios[f'{model}-{name}']:.2f}" for model in ("small-cnn", "mlp"))
    return Claim(text, "a step of SGD", f"medians of CPU time: {JUDGED} {ratio:.2f}; {rest}", held, finding)
