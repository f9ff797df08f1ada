"""Is a graph network trained layer by layer as good as one trained end to end, and what does it save?

python benchmarks/claims l2-gcn
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from common import Cell, Claim, compare, paired, spread

from trellis.data.base import ClientData, Split
from trellis_clients.trainer import Task, Turn
from trellis_clients.trainers.graphs.l2_gcn import L2Gcn

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "l2-gcn.yaml"
VARIANTS = {
    "layer-wise": {},
    "end-to-end": {"trainer": {"scheme": "end-to-end"}},
    "no-edges": {"trainer": {"neighbours": False}},
    "learned": {"trainer": {"controller": "learned"}, "rounds": {"count": 50}},
    "shortest": {"trainer": {"layer_epochs": 35}, "rounds": {"count": 14}},
}
LOST, FALSIFIED, GAINED, SAVED, LEARNED_LOST = 2.0, 5.0, 10.0, 0.75, 1.0
"""Points of accuracy that layers may lose, and that refute the claim; points gained by edges; share of the epochs that
a learned schedule may use, and points that it may lose."""
NODES, EPOCHS, FASTER = 20_000, 10, 0.7


def measure(seeds: int = 5) -> list[Claim]:
    cells = compare(SCENARIO, VARIANTS, seeds=range(seeds), overrides=["evaluation.federated_every=0"])

    def accuracy(variant: str) -> list[float]:
        return [100 * cell.last("central", "accuracy") for cell in cells[variant]]

    layers, whole, blind, learned, shortest = (accuracy(variant) for variant in VARIANTS)
    epochs = [cell.last("central", "epochs") for cell in cells["learned"]]
    loss, edges, drop = paired(layers, whole), paired(layers, blind), paired(learned, layers)
    share = [each / cells["layer-wise"][0].last("central", "epochs") for each in epochs]
    seconds = speed()
    ratios = [fast / slow for fast, slow in zip(seconds["layer-wise"], seconds["end-to-end"], strict=True)]
    return [
        Claim(
            f"layer by layer loses at most {LOST:g} points of accuracy, at equal epochs",
            f"end to end, {total(cells['end-to-end'], 'products')} sparse products a client",
            f"{spread(layers)} against {spread(whole)} %: {spread(loss, sign=True)} points, {seeds} seeds, with "
            f"{total(cells['layer-wise'], 'products')} products",
            "held" if mean(loss) >= -LOST else "not held" if mean(loss) < -FALSIFIED else "in part",
            "End to end has one step on the whole subgraph an epoch, layers one a mini-batch.",
        ),
        Claim(
            f"edges are worth {GAINED:g} points",
            "the same layers without edges",
            f"{spread(layers)} against {spread(blind)} %: {spread(edges, sign=True)} points",
            "held" if mean(edges) >= GAINED else "not held",
        ),
        Claim(
            f"a learned schedule takes at most {SAVED:g} of the epochs and loses at most {LEARNED_LOST:g} point",
            "80 epochs a layer",
            f"{spread(epochs, 0)} of 160 epochs ({spread(share, 2)}); {spread(drop, sign=True)} points",
            "held"
            if mean(share) <= SAVED and mean(drop) >= -LEARNED_LOST
            else "in part"
            if mean(share) <= SAVED or mean(drop) >= -LEARNED_LOST
            else "not held",
            "It seldom goes far beyond the least number of epochs it may take; a fixed 35 epochs a layer do as well: "
            f"{spread(shortest)} % against {spread(learned)} %.",
        ),
        Claim(
            f"at {NODES} nodes layer-wise training takes at most {FASTER:g} of the CPU time",
            "end to end on the whole graph, equal epochs",
            f"{spread(seconds['layer-wise'], 2)} against {spread(seconds['end-to-end'], 2)} s for {EPOCHS} epochs a "
            f"layer in mini-batches of 1024: {spread(ratios, 2)}",
            "held" if mean(ratios) <= FASTER else "not held",
            "Its mini-batches take more steps than the whole graph does." if mean(ratios) > FASTER else "",
        ),
    ]


def total(cells: list[Cell], metric: str) -> int:
    return int(sum(line["train"][metric] for line in cells[0].lines if line["train"]))


def speed() -> dict[str, list[float]]:
    """Return CPU seconds of training two layers on one large graph, measured three times."""
    generator = np.random.default_rng(0)
    y = generator.integers(10, size=NODES)
    x = torch.from_numpy(generator.standard_normal((NODES, 64), dtype=np.float32))
    pairs = generator.integers(NODES, size=(2, 4 * NODES))
    pairs = pairs[:, pairs[0] != pairs[1]]
    edges = torch.from_numpy(np.unique(np.concatenate([pairs, pairs[::-1]], 1), axis=1))
    task = Task("graph", (64,), tuple(map(str, range(10))), {"edges": edges}, torch.nn.Identity, 0, torch.device("cpu"))
    data = Split.whole(x=x, y=torch.from_numpy(y))
    torch.set_num_threads(1)  # or the CPU time would be that of idle threads as well
    found = {}
    for scheme in ("layer-wise", "end-to-end"):
        epochs = EPOCHS if scheme == "layer-wise" else 2 * EPOCHS
        config = L2Gcn.Config(
            scheme=scheme, controller="fixed", batch_size=1024, local_epochs=epochs, layer_epochs=EPOCHS
        )
        times = []
        for _ in range(3):
            trainer, state = L2Gcn(config, task), {}
            model, client = trainer.build(), ClientData(0, data, data)
            start = time.process_time()
            for number in range(1, 3 if scheme == "layer-wise" else 2):
                trainer.fit(model, client, state, Turn(number, 2, 0, 1, torch.Generator().manual_seed(number)))
            times.append(time.process_time() - start)
        found[scheme] = times
    return found
