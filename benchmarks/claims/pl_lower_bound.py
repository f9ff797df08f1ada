"""Is momentum worth a constant on the hard function, and a square root on a quadratic as badly conditioned?

python benchmarks/claims pl-lower-bound
"""

from __future__ import annotations

from math import ceil, log
from pathlib import Path
from statistics import linear_regression

import torch
from common import Claim, compare

from trellis.data.base import ClientData, Split
from trellis_clients.trainer import Task, Turn
from trellis_clients.trainers.theory.pl_lower_bound import PlLowerBound, hard_terms, least_value, targets

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "pl-lower-bound.yaml"
LENGTHS = (10, 20, 40, 80, 160)
BLOCKS = 6
TOLERANCE = 0.01
MOMENTA = ("heavy-ball", "nesterov", "nesterov-increasing")
CHUNK = 50


def measure(seeds: int = 1) -> list[Claim]:
    del seeds  # nothing here is drawn
    alike = "; the same on every seed, as nothing is drawn"
    hard = {method: [calls("hard", method, length) for length in LENGTHS] for method in ("gd", *MOMENTA, "adam")}
    quadratic = {method: [calls("quadratic", method, length) for length in LENGTHS] for method in ("gd", "nesterov")}
    best = [min(hard[method][i] for method in MOMENTA) for i in range(len(LENGTHS))]
    gains = [gd / momentum for gd, momentum in zip(hard["gd"], best, strict=True)]
    slopes = {method: slope(hard[method]) for method in ("gd", *MOMENTA)}
    adam = [gd / each for gd, each in zip(hard["gd"], hard["adam"], strict=True)]
    contrast = [gd / other for gd, other in zip(quadratic["gd"], quadratic["nesterov"], strict=True)]
    steep = slope(quadratic["nesterov"])
    least = [needed(length) for length in LENGTHS]
    clear = all(found >= bound for each in hard.values() for found, bound in zip(each, least, strict=True))
    rounds = local_rounds()
    return [
        Claim(
            "on the hard function calls of gradient descent and of the three momentum methods grow in proportion to "
            "L/mu (slopes in [0.9, 1.1] from L/mu = 881 to 14095), and momentum is worth a factor of 2 at most",
            "gradient descent with step 1/L",
            f"slopes {', '.join(f'{name} {value:.2f}' for name, value in slopes.items())}; gradient descent "
            f"{listed(hard['gd'])} calls, best momentum {listed(best)}: {min(gains):.2f} to {max(gains):.2f} times. "
            f"Adam, for which no gate was set: slope {slope(hard['adam']):.2f}, {listed(hard['adam'])} calls, "
            f"{min(adam):.2f} to {max(adam):.2f} times" + alike,
            "held" if all(0.9 <= s <= 1.1 for s in slopes.values()) and max(gains) <= 2 else "not held",
            "The gate is for the three momentum methods. Adam gains more and its slope is less than one over these "
            "L/mu, which the bound leaves room for: it stays above the least number of calls (below).",
        ),
        Claim(
            "on a quadratic of the same L/mu momentum is worth more the worse it is (slope in [0.4, 0.6])",
            "gradient descent with step 1/L",
            f"slope {steep:.2f}; {listed(quadratic['gd'])} against {listed(quadratic['nesterov'])} calls: "
            f"{contrast[0]:.1f} to {contrast[-1]:.1f} times" + alike,
            "held" if 0.4 <= steep <= 0.6 and contrast == sorted(contrast) else "not held",
        ),
        Claim(
            "no method reaches the tolerance before the bound allows",
            f"the least number of calls by the zero chain, {listed(least)}",
            f"least of all methods {listed([min(each[i] for each in hard.values()) for i in range(len(LENGTHS))])}"
            + alike,
            "held" if clear else "not held",
            "Adam comes closest: its steps do not shrink with the gradient, so a coordinate that is reached moves on "
            "at once.",
        ),
        Claim(
            "in a federation the bound counts rounds too if neighbouring terms are on different clients (here 59)",
            "one local step a round: " + str(rounds["gd"]) + " rounds",
            f"ten local steps a round: {rounds['local-steps-interleaved']} rounds with interleaved terms, "
            f"{rounds['local-steps']} with contiguous ones" + alike,
            "held" if rounds["local-steps-interleaved"] >= least[0] else "not held",
            "Where a client holds neighbouring terms, its own steps pass on what would otherwise take a round each.",
        ),
    ]


def calls(function: str, method: str, length: int) -> int:
    """Return how many oracle calls a method takes to the tolerance."""
    config = {"function": function, "method": method, "block_length": length, "blocks": BLOCKS, "dealt": "whole"}
    task = Task("none", (), (), {}, torch.nn.Identity, 0, torch.device("cpu"))
    trainer = PlLowerBound(PlLowerBound.Config(**config, local_steps=CHUNK, tolerance=TOLERANCE), task)
    model, none = trainer.build(), Split.whole(x=torch.empty(0))
    state, taken = {}, 0
    while model.calls == taken:
        trainer.fit(model, ClientData(0, none, none), state, Turn(1, 1, 0, 1, torch.Generator()))
        taken += CHUNK
    return int(model.calls)


def needed(length: int) -> int:
    """Return the least number of coordinates that must move before the function can be within the tolerance."""
    y = targets(length, BLOCKS)
    goal = TOLERANCE * float(hard_terms(y, length).sum())
    return next(k for k in range(len(y) + 1) if float(least_value(y, k)) <= goal)


def slope(found: list[int]) -> float:
    """Return the slope of calls against L/mu, both on a log scale."""
    return linear_regression([log(length) for length in LENGTHS], [log(each) for each in found]).slope


def local_rounds() -> dict[str, int]:
    names = {"gd": 1, "local-steps": 10, "local-steps-interleaved": 10}
    changes = {
        "gd": {},
        "local-steps": {"trainer": {"local_steps": 10}},
        "local-steps-interleaved": {"trainer": {"local_steps": 10, "dealt": "interleaved"}},
    }
    cells = compare(SCENARIO, changes, seeds=[0], overrides=["evaluation.central_every=300"])
    return {name: ceil(cells[name][0].last("central", "oracle-calls") / steps) for name, steps in names.items()}


def listed(values: list[int]) -> str:
    return "/".join(map(str, values))
