"""Single-Path NAS: latency falls with its weight, and the found network against random ones of its latency."""

from __future__ import annotations

import random
from itertools import pairwise, product
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from common import Cell, Claim, compare, paired, spread

from trellis import scenario
from trellis_clients.trainers.architecture_search._superkernel import OPTIONS, latency
from trellis_clients.trainers.architecture_search.single_path_nas import around, counted, decisions_of, places

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "single-path-nas.yaml"
WEIGHTS = (0.0, 0.05, 0.2, 0.5)
MIDDLE = 0.2
FALL = 0.2
RANDOM, NEAR = 10, 0.05
"""Random networks a seed, and how far their latency may be from that of the found one."""
LAST_ONLY = ["evaluation.federated_every=0", "evaluation.central_every=1000"]
SEARCH = [*LAST_ONLY, "rounds.count=12"]
FROM_SCRATCH = [*LAST_ONLY, "rounds.count=8"]
CONFIG = scenario.config_of(scenario.expand(scenario.load(SCENARIO))[0][1], "trainers")[1]
PLACES = places((8, 8), CONFIG.stem, CONFIG.groups)


def measure(seeds: int = 3) -> tuple[list[Claim], dict[str, Any]]:
    searches = {f"weight-{weight}": {"trainer": {"latency_weight": weight}} for weight in WEIGHTS}
    cells = compare(SCENARIO, searches, range(seeds), SEARCH)
    found = {weight: [architecture(cell) for cell in cells[f"weight-{weight}"]] for weight in WEIGHTS}
    medians = [median(cost(network) for network in networks) for networks in found.values()]
    falls = all(later <= earlier for earlier, later in pairwise(medians))
    fall = 1 - medians[-1] / medians[0]
    trained = [against_random(network, seed) for seed, network in enumerate(found[MIDDLE])]
    own = [scores[0] for _, scores in trained]
    others = [mean(scores[1:]) for _, scores in trained]
    claims = [
        Claim(
            f"the heavier latency weighs, the faster the found network: by {100 * FALL:.0f} % from weight 0 to 0.5",
            "the same search with a lighter weight (0, 0.05, 0.2, 0.5)",
            f"median latency {', '.join(f'{value:.0f}' for value in medians)} thousand multiply-accumulates, of"
            f" {cost(('5x5-e6',) * len(PLACES)):.0f}; {100 * fall:.0f} % less",
            "held" if falls and fall >= FALL else "in part" if fall >= FALL else "not held",
            "" if falls or fall < FALL else "Medians do not fall at every weight.",
        ),
        Claim(
            f"trained from scratch, what was found at {MIDDLE} is no less accurate than random networks of its latency",
            f"{RANDOM} other networks a seed within {100 * NEAR:.0f} % of its latency",
            f"{spread(own)} against {spread(others)} %: {spread(paired(own, others), sign=True)} points; ahead of"
            f" {'/'.join(str(sum(scores[0] > other for other in scores[1:])) for _, scores in trained)} of {RANDOM}",
            "held" if mean(paired(own, others)) >= 0 else "not held",
            caveat(paired(own, others), [stdev(scores[1:]) for _, scores in trained]),
        ),
    ]
    return claims, {
        "found, by weight and seed": {str(weight): networks for weight, networks in found.items()},
        "latency, by weight and seed": {str(weight): list(map(cost, networks)) for weight, networks in found.items()},
        "from scratch, the found one first, by seed": [
            [
                {"network": network, "latency": cost(network), "accuracy": score}
                for network, score in zip(*each, strict=True)
            ]
            for each in trained
        ],
    }


def against_random(network: tuple[str, ...], seed: int) -> tuple[list[tuple[str, ...]], list[float]]:
    """Train a network and random ones of its latency; return them, itself first, and their accuracies in percent."""
    networks = [network, *rivals(network, seed)]
    variants = {f"network-{number}": {"trainer": {"architecture": each}} for number, each in enumerate(networks)}
    trained = compare(SCENARIO, variants, [seed], FROM_SCRATCH)
    return networks, [100 * trained[name][0].last("central", "accuracy") for name in variants]


def rivals(network: tuple[str, ...], seed: int) -> list[tuple[str, ...]]:
    """Return ``RANDOM`` other networks of about the same latency; fails where there are not so many."""
    every = product(*(OPTIONS if place.skippable else OPTIONS[1:] for place in PLACES))
    wanted = cost(network)
    alike = [other for other in every if other != network and abs(cost(other) - wanted) <= NEAR * wanted]
    return random.Random(seed).sample(alike, RANDOM)


def caveat(gain: list[float], apart: list[float]) -> str:
    """Return what the gain is worth: a deviation over seeds and one over random networks stand beside it."""
    if len(gain) < 2 or mean(gain) > stdev(gain):
        return ""
    return (
        "Within the spread over seeds: digits hardly tell such networks apart, random ones of that latency differ by"
        f" {mean(apart):.1f} points (standard deviation) among themselves."
    )


def architecture(cell: Cell) -> tuple[str, ...]:
    """Return the options that a search has come to."""
    return tuple(OPTIONS[int(cell.last("central", f"layer-{number}"))] for number in range(len(PLACES)))


def cost(options: tuple[str, ...]) -> float:
    """Return the latency that the trainer predicts for a network."""
    each = [float(latency(decisions_of(option), row)) for option, row in zip(options, counted(PLACES), strict=True)]
    return sum(each) + around(PLACES, channels=1, classes=10)
