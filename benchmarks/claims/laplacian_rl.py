"""Do decreasing coefficients find the eigenvectors, and do exchanged second moments make them everybody's?

python benchmarks/claims laplacian-rl
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from common import Cell, Claim, compare, paired, spread

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "laplacian-rl.yaml"
LEAST, GAIN, MISSED = 0.95, 0.4, 0.1
"""Similarity that ordered coordinates reach, what they gain over unordered ones, and the most either misses of the
space; on every seed."""


def measure(seeds: int = 3) -> list[Claim]:
    cells = compare(SCENARIO, seeds=range(seeds), overrides=["evaluation.central_every=200"])

    def of(variant: str, metric: str, where: str = "central") -> list[float]:
        found: list[Cell] = cells[variant]
        return [cell.last(where, metric) for cell in found]

    ordered, unordered = of("ordered", "similarity"), of("unordered", "similarity")
    alone, apart = of("weights-only", "similarity"), of("moments-only", "similarity", "federated")
    gains = paired(ordered, unordered)
    missed = [*of("ordered", "subspace"), *of("unordered", "subspace")]
    found = min(ordered) >= LEAST and min(gains) >= GAIN and max(missed) < MISSED
    joint = paired(ordered, alone)
    return [
        Claim(
            f"decreasing coefficients find the eigenvectors one by one (similarity {LEAST:g}, {GAIN:g} more than equal "
            f"ones on each seed) where both find their space (less than {MISSED:g} of it missed)",
            "graph drawing with equal coefficients",
            f"{spread(ordered, 3)} against {spread(unordered, 3)}, {seeds} seeds; missed at most {max(missed):.1e}",
            "held" if found else "in part" if min(gains) > 0 else "not held",
        ),
        Claim(
            "three clients who each know a part of the world need the union's second moments for it",
            "weights averaged, each client's coordinates orthonormal on its own states",
            f"{spread(ordered, 3)} against {spread(alone, 3)}, which miss {spread(of('weights-only', 'subspace'), 3)} "
            "of the space",
            "held" if min(joint) > 0.1 else "in part" if mean(joint) > 0 else "not held",
        ),
        Claim(
            "second moments alone, in place of weights, will do",
            "moments beside weights",
            f"similarity on the clients {spread(apart, 3)} against {spread(ordered, 3)}",
            "held" if min(apart) >= LEAST else "not held",
            "No edge joins one client's graph to another's, so the constraint on the mean is met best by coordinates "
            "that are constant on each client; weights have to travel as well.",
        ),
    ]
