"""Single-Path NAS: latency falls with its weight, and the found network against random ones of its latency."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from common import Cell, Claim, compare, paired, spread

from trellis_clients.trainers.architecture_search._superkernel import OPTIONS, latency
from trellis_clients.trainers.architecture_search.single_path_nas import SinglePathNas, decisions_of, places

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "single-path-nas.yaml"
WEIGHTS = (0.0, 0.05, 0.2, 0.5)
MIDDLE = 0.2
RANDOM = 5
ALIKE = ["evaluation.federated_every=0", "evaluation.central_every=1000"]  # after the last round only
CONFIG = SinglePathNas.Config()
PLACES = places(8, CONFIG.stem, CONFIG.groups)


def measure(seeds: int = 3) -> tuple[list[Claim], dict[str, Any]]:
    searches = {f"weight-{weight}": {"trainer": {"latency_weight": weight}} for weight in WEIGHTS}
    cells = compare(SCENARIO, searches, range(seeds), ALIKE)
    found = {weight: [cell.last("central", "latency") for cell in cells[f"weight-{weight}"]] for weight in WEIGHTS}
    medians = [median(values) for values in found.values()]
    falls = all(later <= earlier for earlier, later in pairwise(medians))
    fall = 1 - medians[-1] / medians[0]

    own, others, apart = [], [], []
    for seed in range(seeds):
        network = architecture(cells[f"weight-{MIDDLE}"][seed])
        rivals = drawn(cost(network), seed)
        variants = {
            name: {"trainer": {"architecture": options}}
            for name, options in {"found": network, **{f"random-{n}": rival for n, rival in enumerate(rivals)}}.items()
        }
        trained = compare(SCENARIO, variants, [seed], [*ALIKE, "trainer.local_epochs=1", "rounds.count=5"])
        scores = {name: 100 * of[0].last("central", "accuracy") for name, of in trained.items()}
        own.append(scores.pop("found"))
        others.append(mean(scores.values()))
        apart.append(stdev(scores.values()))
    gain = paired(own, others)
    claims = [
        Claim(
            "the heavier latency weighs, the faster the found network: at least 20 % from weight 0 to 0.5",
            "the same search with a lighter weight (0, 0.05, 0.2, 0.5)",
            f"median latency {', '.join(f'{value:.0f}' for value in medians)} thousand multiply-accumulates, of"
            f" {cost(['5x5-e6'] * len(PLACES)):.0f}; {100 * fall:.0f} % less",
            "held" if falls and fall >= 0.2 else "in part" if fall >= 0.2 else "not held",
            "" if falls and fall >= 0.2 else "Thresholds move slowly: with two thirds of the steps the fall was 19 %.",
        ),
        Claim(
            f"trained from scratch, what was found at {MIDDLE} is no less accurate than random networks of its latency",
            f"{RANDOM} random networks a seed within 5 % of its latency",
            f"{spread(own)} against {spread(others)} %: {spread(gain, sign=True)} points",
            "held" if mean(gain) >= 0 else "not held",
            ""
            if mean(gain) >= 0
            else "Digits do not tell such networks apart: random ones of that latency differ among themselves by"
            f" {mean(apart):.1f} points.",
        ),
    ]
    return claims, {
        "latency": {str(weight): values for weight, values in found.items()},
        "found": own,
        "random": others,
    }


def architecture(cell: Cell) -> list[str]:
    """Return the options that a search has come to."""
    return [OPTIONS[int(cell.last("central", f"layer-{number}"))] for number in range(len(PLACES))]


def cost(options: list[str]) -> float:
    """Return the latency that the trainer predicts for a network."""
    rows = [[place.macs(kernel, expansion) for kernel in (3, 5) for expansion in (3, 6)] for place in PLACES]
    each = [float(latency(decisions_of(option), row)) for option, row in zip(options, rows, strict=True)]
    return sum(each) + CONFIG.fixed_latency


def drawn(wanted: float, seed: int) -> list[list[str]]:
    """Return random networks within 5 % of a latency."""
    generator, result = random.Random(seed), []
    for _ in range(200_000):
        options = [generator.choice(OPTIONS if place.skippable else OPTIONS[1:]) for place in PLACES]
        if abs(cost(options) - wanted) <= 0.05 * wanted and options not in result:
            result.append(options)
        if len(result) == RANDOM:
            break
    return result
