"""Do decreasing coefficients find the eigenvectors, and do exchanged second moments make them everybody's?

python benchmarks/claims laplacian-rl
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import numpy as np
import torch
from common import Claim, compare, paired, spread
from safetensors.torch import load_file

from trellis.data.loading import load_federation
from trellis.runs import CellFolder
from trellis.scenario import Scenario
from trellis_clients.client_state import unpack
from trellis_clients.site import KEPT
from trellis_clients.trainers.reinforcement.laplacian_rl import compared, eigenvectors
from trellis_server import checkpoint

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "laplacian-rl.yaml"
LEAST, GAIN, MISSED = 0.95, 0.4, 0.1
"""Similarity that ordered coordinates reach, what they gain over unordered ones, and the most either misses of the
space; on every seed."""


def measure(seeds: int = 3) -> list[Claim]:
    cells = compare(SCENARIO, seeds=range(seeds), overrides=["evaluation.central_every=200"], also=judged)

    def of(variant: str, figure: str) -> list[float]:
        return [cell.extra[figure] for cell in cells[variant]]

    ordered, unordered = of("ordered", "similarity"), of("unordered", "similarity")
    alone, apart = of("weights-only", "similarity"), of("moments-only", "similarity")
    gains = paired(ordered, unordered)
    missed = [*of("ordered", "missed"), *of("unordered", "missed")]
    world = (
        f"{int(of('ordered', 'states')[0])} states, d = 4, lambda_2 {spread(of('ordered', 'gap'), 3)}, {seeds} seeds"
    )
    found = min(ordered) >= LEAST and min(gains) >= GAIN and max(missed) < MISSED
    joint = paired(ordered, alone)
    return [
        Claim(
            f"decreasing coefficients find the eigenvectors one by one (similarity {LEAST:g}, {GAIN:g} more than equal "
            f"ones on each seed) where both find their space (less than {MISSED:g} of it missed)",
            "graph drawing with equal coefficients",
            f"{spread(ordered, 3)} against {spread(unordered, 3)}; without the first, which is constant, "
            f"{spread(of('ordered', 'rest'), 3)} against {spread(of('unordered', 'rest'), 3)}; missed at most "
            f"{max(missed):.1e}; {world}",
            "held" if found else "in part" if min(gains) > 0 else "not held",
        ),
        Claim(
            "three clients who each know a part of the world need the union's second moments for it",
            "weights averaged, each client's coordinates orthonormal on its own states",
            f"{spread(ordered, 3)} against {spread(alone, 3)}, which miss {spread(of('weights-only', 'missed'), 3)} "
            f"of the space; without the first {spread(of('ordered', 'rest'), 3)} against "
            f"{spread(of('weights-only', 'rest'), 3)}; {world}",
            "held" if min(joint) > 0.1 else "in part" if mean(joint) > 0 else "not held",
        ),
        Claim(
            "second moments alone, in place of weights, will do",
            "moments beside weights",
            f"similarity on the clients {spread(apart, 3)} against {spread(ordered, 3)}; without the first "
            f"{spread(of('moments-only', 'rest'), 3)} against {spread(of('ordered', 'rest'), 3)}; {world}",
            "held" if min(apart) >= LEAST else "not held",
            "No edge joins one client's graph to another's, so the constraint on the mean is met best by coordinates "
            "that are constant on each client; weights have to travel as well.",
        ),
    ]


def judged(each: Scenario, place: CellFolder) -> dict[str, float]:
    """Compare what a run learnt with the eigenvectors of the steps that its clients trained on, means over clients.

    The trainer's own metrics take all of the data set's training steps, also those held back by the clients.
    """
    federation = load_federation(each, place.seed)
    states = len(federation.data.facts["positions"])
    steps = np.zeros((states, states), np.int64)
    for client in range(federation.num_clients):
        held = federation.client(client).train
        walks = held.fields["x"][held.rows].numpy()
        np.add.at(steps, (walks[:, :-1].ravel(), walks[:, 1:].ravel()), 1)
    found = [compared(table.double(), steps) for table in tables(place)]
    return {
        "similarity": mean(float(cosines.mean()) for cosines, _ in found),
        "rest": mean(float(cosines[1:].mean()) for cosines, _ in found),
        "missed": mean(missed for _, missed in found),
        "gap": float(eigenvectors(steps)[0][1]),
        "states": states,
    }


def tables(place: CellFolder) -> list[torch.Tensor]:
    """Return the cloud's coordinates of all states; each client's, where those stay there."""
    final = load_file(place.path / "model.safetensors")
    if "body.weight" in final:
        return [final["body.weight"]]
    snapshot = checkpoint.load(place.checkpoint)
    assert snapshot is not None
    return [unpack(state)[KEPT]["body.weight"] for _, state in sorted(snapshot.clients.items())]
