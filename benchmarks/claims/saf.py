"""SAF's step time, sharpness and accuracy under FedAvg, by the loss's weight and with clients that sit rounds out.

python benchmarks/claims saf
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from _sharpness import flatter, more_accurate, robust, run, step_time, trainer, under_noise, values
from common import Claim, paired, spread

SOME = {"rounds": {"count": 20, "clients_per_round": 4}}
VARIANTS = {
    "sgd": trainer("sgd"),
    "saf": trainer("saf"),
    "saf-2": trainer("saf", weight=2.0),
    "saf-7.5": trainer("saf", weight=7.5),  # lambda tau², the strength that 0.3 has at a temperature of 1
    "sgd-some": {**trainer("sgd"), **SOME},
    "saf-some": {**trainer("saf", weight=2.0), **SOME},
    "saf-some-fresh": {**trainer("saf", weight=2.0, max_age=4), **SOME},
    "fedprox-some": {**trainer("fedprox", mu=0.1), **SOME},
}
NOISY: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd"},
    "saf": {"name": "saf"},
    "lambda 7.5": {"name": "saf", "weight": 7.5},
}


def measure(seeds: int = 5) -> tuple[list[Claim], dict[str, list[dict[str, float]]]]:
    rows = run(VARIANTS, seeds)
    sgd, saf = rows["sgd"], rows["saf"]

    def ratio(name: str, key: str = "eigenvalue") -> float:
        return mean(values(rows[name], key)) / mean(values(sgd, key))

    def gain(name: str, base: str = "sgd") -> str:
        return spread(paired(values(rows[name], "accuracy"), values(rows[base], "accuracy")), sign=True)

    heavier = (
        f"The eigenvalue's ratio with lambda 2 is {ratio('saf-2'):.2f}, with 7.5 (0.3 tau²) {ratio('saf-7.5'):.2f}, at "
        f"{ratio('saf-2', 'loss'):.1f} and {ratio('saf-7.5', 'loss'):.1f} times SGD's training loss."
    )
    sitting = (
        f"With lambda 2 {gain('saf-2')}, with 7.5 {gain('saf-7.5')}. With four of ten clients a round and lambda 2 "
        f"{gain('saf-some', 'sgd-some')}, without outputs older than four rounds {gain('saf-some-fresh', 'sgd-some')}; "
        f"FedProx there {gain('fedprox-some', 'sgd-some')}."
    )
    noisy = under_noise(NOISY, seeds)
    claims = [
        step_time("saf", 1.05, "a step takes as long (up to 1.05)"),
        flatter(saf, sgd, 0.8, heavier),
        more_accurate(saf, sgd, sitting),
        robust(noisy, "saf", 0.8),
    ]
    return claims, {**rows, **{f"noise: {name}": found for name, found in noisy.items()}}
