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
VARIANTS: dict[str, dict[str, Any]] = {
    "sltt": {},
    "sltt-2": {"trainer": {"steps": 2}},
    "sltt-2-rescaled": {"trainer": {"steps": 2, "rescale": True}},
    "bptt": {"trainer": {"gradient": "bptt"}},
}


def measure(seeds: int = 3) -> tuple[list[Claim], dict[str, Any]]:
    torch.set_num_threads(1)
    cells = compare(SCENARIO, VARIANTS, range(seeds), ["evaluation.federated_every=0", "rounds.count=10"])
    details = {
        "accuracy": {name: [100 * cell.last("central", "accuracy") for cell in each] for name, each in cells.items()},
        "bytes held": {
            gradient: {str(steps): [memory(gradient, steps, seed) for seed in range(seeds)] for steps in (2, 4, 8)}
            for gradient in ("sltt", "bptt")
        },
        "cosine": {str(tau): [cosine(tau, seed) for seed in range(seeds)] for tau in (1.1, 2.0)},
        "CPU ms": [iteration() for _ in range(seeds)],
    }
    return judged(details), details


def judged(details: dict[str, Any]) -> list[Claim]:
    """Return the claims: accuracy in percent, bytes by gradient and steps, cosines by tau, each seed by seed; times."""
    accuracy, held, times = details["accuracy"], details["bytes held"], details["CPU ms"]
    gaps = paired(accuracy["sltt"], accuracy["bptt"])
    stays, grows = (
        [late / early for late, early in zip(held[g]["8"], held[g]["2"], strict=True)] for g in ("sltt", "bptt")
    )
    close, far = details["cosine"]["1.1"], details["cosine"]["2.0"]
    ratios = [one / four for one, four in times]
    return [
        Claim(
            f"memory for the backward pass grows with the time steps through time (2 to 8 steps: {GROWS:g} times) and "
            f"not without (at most {STAYS:g})",
            "back-propagation through time",
            f"{listed(held['sltt'])} KB against {listed(held['bptt'])} KB at 2/4/8 steps: {spread(stays, 2)} and "
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
            f"at most {GAP:g} points of accuracy are lost in the mean over seeds",
            "back-propagation through time",
            f"{spread(accuracy['sltt'])} against {spread(accuracy['bptt'])} %: {spread(gaps, sign=True)} points, "
            f"{len(gaps)} seeds",
            "held" if mean(gaps) >= -GAP else "not held" if mean(gaps) < -FALSIFIED else "in part",
            f"By seed {', '.join(f'{gap:+.1f}' for gap in gaps)}. Two steps of six, drawn for each batch, reach"
            f" {spread(accuracy['sltt-2'])} %, and rescaled by 6/2 {spread(accuracy['sltt-2-rescaled'])} %.",
        ),
        Claim(
            f"one step of four sent back takes at most {FASTER:g} of the time of all four",
            "SLTT with all steps",
            f"{spread([one for one, _ in times])} against {spread([four for _, four in times])} ms of CPU time an "
            f"iteration: {spread(ratios, 2)}",
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


def iteration() -> tuple[float, float]:
    """Return the median CPU milliseconds of an iteration with one and with all of four steps sent back.

    The two take turns, so that whatever else the machine does meets both alike.
    """
    both = [bench("data.steps=4", *overrides) for overrides in (["trainer.steps=1"], [])]
    times: list[tuple[float, ...]] = []
    for _ in range(100):
        pair = []
        for trainer, model, batch, turn in both:
            start = time.process_time()
            model.zero_grad(set_to_none=True)
            trainer.backward(model, batch, turn)
            pair.append(1000 * (time.process_time() - start))
        times.append(tuple(pair))
    one, four = (median(column) for column in zip(*times[10:], strict=True))
    return one, four


def listed(held: dict[str, list[int]]) -> str:
    return "/".join(f"{mean(each) / 1000:.0f}" for each in held.values())
