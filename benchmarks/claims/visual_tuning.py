"""Do few tuned parameters of a frozen transformer do as well as all of them, and what does a step keep in memory?

The rates in the scenario are the best of three for each kind, under seeds 100 and 101. Test digits are the same for all
seeds; which labels there are, and the pretrained base, are each seed's own.

    python benchmarks/claims visual-tuning
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import torch
from common import Claim, Verdict, compare, paired, spread
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from trellis import scenario
from trellis.data.loading import load_data
from trellis_clients.site import Cell, Site
from trellis_clients.trainers.tuning._memory import saved_for_backward

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "visual-tuning.yaml"
WAYS = ("prompt", "adapter", "parameter", "remapping")
MOST = 0.10
"""Share of the model that may be tuned."""
NEAR = 1.0
"""Points of accuracy below full tuning that still count as equal."""
BETTER = {"name": "novel-digits", "per_class": 20, "base_digits": 8}
"""Data whose base has more to learn from."""


def measure(seeds: int = 5) -> list[Claim]:
    cells = compare(SCENARIO, seeds=range(seeds))
    accuracy = {name: [100 * cell.last("central", "accuracy") for cell in each] for name, each in cells.items()}
    shares = {name: each[0].last("train", "tuned-share") for name, each in cells.items()}
    gains = {way: paired(accuracy[way], accuracy["linear"]) for way in WAYS}
    said = "; ".join(f"{way} {spread(gains[way], sign=True)} ({100 * shares[way]:.1f} % tuned)" for way in WAYS)
    best = max((way for way in WAYS if shares[way] <= MOST), key=lambda way: mean(accuracy[way]))
    behind = paired(accuracy[best], accuracy["full"])
    gaining = sum(mean(gain) > 0 for gain in gains.values())
    kept = memory()
    return [
        Claim(
            "each way of tuning a frozen transformer beats training the head alone",
            "linear probe",
            f"{said}; linear {spread(accuracy['linear'])} %, {seeds} seeds",
            "held" if gaining == len(WAYS) else "in part" if gaining else "not held",
        ),
        Claim(
            f"the best of four is within {NEAR:g} point of full tuning with at most {100 * MOST:.0f} % of the weights",
            "full tuning",
            f"{best} {spread(accuracy[best])} against {spread(accuracy['full'])} %: {spread(behind, sign=True)} points",
            near(behind),
            "" if mean(behind) >= -NEAR else why(seeds),
        ),
        Claim(
            "a ladder keeps less for the backward pass than other ways, as nothing of the encoder is kept",
            "LoRA on queries and values",
            f"{kept['remapping']} against {kept['parameter']} kB a step of 20 images "
            f"(prompts {kept['prompt']}, adapters {kept['adapter']}, all weights {kept['full']}), under every seed",
            "held" if kept["remapping"] < min(kept[way] for way in WAYS[:3]) else "not held",
        ),
    ]


def near(behind: list[float]) -> Verdict:
    """Held if the mean is near enough, in part if it is three times as far."""
    return "held" if mean(behind) >= -NEAR else "in part" if mean(behind) >= -3 * NEAR else "not held"


def why(seeds: int) -> str:
    """Say how much of the distance is the base's: bare pixels as features, and a base that knows eight digits."""
    pixels = spread([100 * on_pixels(seed) for seed in range(seeds)])
    kinds = {"adapter": {"kind": "adapter", "lr": 0.02}, "full": {"kind": "full", "lr": 0.002}}
    cells = compare(SCENARIO, {name: {"data": BETTER, "trainer": each} for name, each in kinds.items()}, range(seeds))
    adapter, full = ([100 * cell.last("central", "accuracy") for cell in cells[name]] for name in kinds)
    behind = spread(paired(adapter, full), sign=True)
    return (
        f"The base is poor: it knows five digits from 900 scans, and a logistic regression on bare pixels is right in "
        f"{pixels} %. With a base of eight digits, and two to learn, adapters are {behind} points from full tuning "
        f"({spread(adapter)} and {spread(full)} %)."
    )


def memory() -> dict[str, int]:
    """Return the kB that a step on 20 images keeps for its backward pass, by variant. Untrained weights will do."""
    whole = scenario.load(SCENARIO, ["trainer.base.epochs=0"])
    kept = {}
    for name, each in scenario.expand(whole):
        site = Site(Cell(scenario.plain(each), 0))
        batch = site.federation.data.train.batch(torch.arange(20))
        model = site.model.train()
        kept[name] = saved_for_backward(model, lambda m=model, b=batch: F.cross_entropy(m(b.x), b.y)) // 1000  # type: ignore[misc]
    return kept


def on_pixels(seed: int) -> float:
    """Return the accuracy of a logistic regression on the labelled images of a seed, all clients' together."""
    data = load_data(scenario.load(SCENARIO), seed)
    train, test = (split.batch(torch.arange(len(split))) for split in (data.train, data.test))
    fitted = LogisticRegression(max_iter=2000).fit(train.x.flatten(1).numpy(), train.y.numpy())
    return float(fitted.score(test.x.flatten(1).numpy(), test.y.numpy()))
