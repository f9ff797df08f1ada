"""Does a student outgrow the predictor it asked, and is it the memory that lets it?

python benchmarks/claims dine
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import Claim, Verdict, compare, paired, spread

from trellis import scenario
from trellis.runs import CellFolder
from trellis.scenario import Scenario
from trellis_clients.site import Cell, Site
from trellis_clients.trainers.domain_adaptation.dine import Dine

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "dine.yaml"
AHEAD, MEMORY, TOLERANCE = 3.0, 1.0, 0.5
"""Points ahead of the predictor, points gained by the memory, points that tuning may lose."""

SHORT = {
    "early": {"rounds": {"count": 12}, "trainer": {"distil": 1.0}},
    "early-smoothed": {"rounds": {"count": 12}, "trainer": {"distil": 1.0, "memory_momentum": 1.0}},
}
"""Distilling for less, with and without a memory that follows."""


def measure(seeds: int = 5) -> list[Claim]:
    cells = compare(SCENARIO, seeds=range(seeds), also=asked)
    cells |= compare(SCENARIO, SHORT, range(seeds))
    found = {name: [100 * cell.last("federated", "accuracy") for cell in each] for name, each in cells.items()}
    service = [cell.extra["service"] for cell in cells["dine"]]
    ahead, memory = paired(found["dine"], service), paired(found["distil-only"], found["smoothed-labels"])
    tuned, apart = paired(found["dine"], found["distil-only"]), paired(found["dine"], found["all"])
    early = paired(found["early"], found["early-smoothed"])
    window = "" if 50 <= mean(service) <= 80 else "The predictor is outside 50 to 80 %, where the test says little."
    return [
        Claim(
            f"the student ends at least {AHEAD:g} points ahead of the predictor it learnt from",
            "the black-box predictor on the same target test digits",
            f"{spread(found['dine'])} against {spread(service)} %: {spread(ahead, sign=True)} points, {seeds} seeds",
            verdict(ahead, AHEAD),
            window,
        ),
        Claim(
            f"in distilling, a memory that follows the student gains at least {MEMORY:g} point",
            "distilling the predictor's smoothed answers for ever",
            f"{spread(found['distil-only'])} against {spread(found['smoothed-labels'])} %: "
            f"{spread(memory, sign=True)} points",
            verdict(memory, MEMORY),
            f"It takes time: after 12 rounds instead of 16 it is {spread(early, sign=True)} points. These students "
            "start from nothing, and the paper's from ImageNet.",
        ),
        Claim(
            f"tuning after distilling does no harm (at most {TOLERANCE:g} points lower)",
            "the same student where tuning began",
            f"{spread(found['dine'])} against {spread(found['distil-only'])} %: {spread(tuned, sign=True)} points",
            verdict(tuned, -TOLERANCE),
        ),
        Claim(
            "where clients' domains differ, each needs a head and batch norms of its own",
            "whole students averaged",
            f"{spread(found['dine'])} against {spread(found['all'])} %: {spread(apart, sign=True)} points",
            verdict(apart, 0.0),
        ),
    ]


def verdict(gains: list[float], threshold: float) -> Verdict:
    """Held if the mean reaches the threshold, in part if it does not but most seeds do."""
    most = sum(gain >= threshold for gain in gains) > len(gains) / 2
    return "held" if mean(gains) >= threshold else "in part" if most else "not held"


def asked(each: Scenario, folder: CellFolder) -> dict[str, Any]:
    """Ask the cell's predictor for the clients' test digits, weighted as the federated evaluation weights them."""
    site = Site(Cell(scenario.plain(each), folder.seed))
    assert isinstance(site.trainer, Dine)
    right = seen = 0
    for client in range(site.federation.num_clients):
        test = site.federation.client(client).test
        batch = test.batch(torch.arange(len(test)))
        right += int((site.trainer.ask(batch.x).argmax(1) == batch.y).sum())
        seen += len(batch)
    return {"service": 100 * right / seen}
