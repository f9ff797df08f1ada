"""Does a spiking network need gradients through time, and what does it cost to keep them?

python benchmarks/claims sltt
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from common import Claim, compare, paired, spread
from torch.nn import functional as F

from trellis.data.base import Batch
from trellis_clients import contract

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "sltt.yaml"
GAP, FALSIFIED, ALIKE, GROWS, STAYS, FASTER = 2.0, 4.0, 0.9, 3.0, 1.1, 0.7
"""Points of accuracy that may be lost, and that refute the claim; least cosine at tau 1.1; memory at 8 steps over that
at 2, at least through time and at most without; time of one step of four sent back over that of four."""


def measure(seeds: int = 3) -> list[Claim]:
    torch.set_num_threads(1)
    cells = compare(SCENARIO, seeds=range(seeds), overrides=["evaluation.federated_every=0"])
    accuracy = {name: [100 * cell.last("central", "accuracy") for cell in each] for name, each in cells.items()}
    gaps = paired(accuracy["sltt"], accuracy["bptt"])
    held = {(g, t): [memory(g, t, seed) for seed in range(seeds)] for g in ("sltt", "bptt") for t in (2, 4, 8)}
    stays, grows = (
        [late / early for late, early in zip(held[g, 8], held[g, 2], strict=True)] for g in ("sltt", "bptt")
    )
    close, far = ([cosine(tau, seed) for seed in range(seeds)] for tau in (1.1, 2.0))
    times = [(seconds(1), seconds(None)) for _ in range(seeds)]
    ratios = [one / four for one, four in times]
    return [
        Claim(
            f"memory for the backward pass grows with the time steps through time (2 to 8 steps: {GROWS:g} times) and "
            f"not without (at most {STAYS:g})",
            "back-propagation through time",
            f"{listed(held, 'sltt')} KB against {listed(held, 'bptt')} KB at 2/4/8 steps: {spread(stays, 2)} and "
            f"{spread(grows, 2)} times",
            "held" if min(grows) >= GROWS and max(stays) <= STAYS else "not held",
        ),
        Claim(
            f"at tau 1.1 the two gradients point the same way (cosine {ALIKE:g}), at tau 2 less so",
            "back-propagation through time",
            f"at the start {spread(close, 3)} at tau 1.1 and {spread(far, 3)} at tau 2",
            "held" if min(close) >= ALIKE and mean(far) < mean(close) else "not held",
        ),
        Claim(
            f"at most {GAP:g} points of accuracy are lost",
            "back-propagation through time",
            f"{spread(accuracy['sltt'])} against {spread(accuracy['bptt'])} %: {spread(gaps, sign=True)} points, "
            f"{seeds} seeds",
            "held" if mean(gaps) >= -GAP else "not held" if mean(gaps) < -FALSIFIED else "in part",
            f"Two steps of six, drawn for each batch, reach {spread(accuracy['sltt-2'])} %.",
        ),
        Claim(
            f"one step of four sent back takes at most {FASTER:g} of the time of all four",
            "SLTT with all steps",
            f"{spread([1000 * one for one, _ in times])} against {spread([1000 * four for _, four in times])} ms of "
            f"CPU time an iteration: {spread(ratios, 2)}",
            "held" if mean(ratios) <= FASTER else "not held",
            "A forward pass is left to do at every step." if mean(ratios) > FASTER else "",
        ),
    ]


def bench(*overrides: str, seed: int = 0, count: int = 32) -> tuple[Any, Any, Batch, Any]:
    _, _, _, turn = contract.bench(SCENARIO, ["variants={}", *overrides])
    site = contract.site_of(SCENARIO, ["variants={}", *overrides], seed)
    return site.trainer, site.model.train(), site.federation.client(0).train.batch(torch.arange(count)), turn


def memory(gradient: str, steps: int, seed: int) -> int:
    """Return the most bytes that wait for a backward pass at a time, each tensor counted once."""
    trainer, model, batch, turn = bench(f"data.steps={steps}", f"trainer.gradient={gradient}", seed=seed)
    counts: dict[int, int] = {}
    now = most = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal now, most
            self.tensor, self.key, self.size = tensor, tensor.data_ptr(), tensor.nbytes
            counts[self.key] = counts.get(self.key, 0) + 1
            now += self.size if counts[self.key] == 1 else 0
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            counts[self.key] -= 1
            now -= self.size if counts[self.key] == 0 else 0

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        trainer.backward(model, batch, turn)
    return most


def cosine(tau: float, seed: int) -> float:
    """Return the cosine of the two gradients of one batch at the start."""
    found = []
    for gradient in ("sltt", "bptt"):
        trainer, model, batch, turn = bench(f"model.tau={tau}", f"trainer.gradient={gradient}", seed=seed, count=64)
        trainer.backward(model, batch, turn)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return float(F.cosine_similarity(*found, dim=0))


def seconds(steps: int | None) -> float:
    """Return the median CPU seconds of an iteration with so many of four steps sent back."""
    overrides = ["data.steps=4", *([f"trainer.steps={steps}"] if steps else [])]
    trainer, model, batch, turn = bench(*overrides)
    times = []
    for _ in range(60):
        start = time.process_time()
        model.zero_grad(set_to_none=True)
        trainer.backward(model, batch, turn)
        times.append(time.process_time() - start)
    return median(times[10:])


def listed(held: dict[tuple[str, int], list[int]], gradient: str) -> str:
    return "/".join(f"{mean(held[gradient, steps]) / 1000:.0f}" for steps in (2, 4, 8))
