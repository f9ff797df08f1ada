"""MESA's step time, sharpness and accuracy under FedAvg, by what its average is and starts from.

python benchmarks/claims mesa-saf
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from _sharpness import flatter, more_accurate, robust, run, step_time, trainer, under_noise, values
from common import Claim, paired, spread

SOME = {"rounds": {"count": 20, "clients_per_round": 4}}
VARIANTS = {
    "sgd": trainer("sgd"),
    "mesa": trainer("mesa-saf"),
    "mesa-0.9": trainer("mesa-saf", decay=0.9),
    "mesa-keep": trainer("mesa-saf", decay=0.98, average="keep"),
    "fedprox": trainer("fedprox", mu=0.1),
    "sgd-some": {**trainer("sgd"), **SOME},
    "mesa-some": {**trainer("mesa-saf"), **SOME},
}
NOISY: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd"},
    "mesa": {"name": "mesa-saf"},
    "lambda 7.5 and beta 0.99": {"name": "mesa-saf", "weight": 7.5, "decay": 0.99},
}


def measure(seeds: int = 5) -> tuple[list[Claim], dict[str, list[dict[str, float]]]]:
    rows = run(VARIANTS, seeds)
    sgd, mesa = rows["sgd"], rows["mesa"]

    def ratio(name: str, key: str = "eigenvalue") -> float:
        return mean(values(rows[name], key)) / mean(values(sgd, key))

    def gain(name: str, base: str = "sgd") -> str:
        return spread(paired(values(rows[name], "accuracy"), values(rows[base], "accuracy")), sign=True)

    averages = (
        f"Eigenvalue's ratio with beta 0.9 {ratio('mesa-0.9'):.2f}, with an average kept over rounds (beta 0.98) "
        f"{ratio('mesa-keep'):.2f}; FedProx, which also holds clients near the global model, {ratio('fedprox'):.2f}."
    )
    others = f"With beta 0.9 {gain('mesa-0.9')}, kept {gain('mesa-keep')}, FedProx {gain('fedprox')}. "
    others += f"With four of ten clients a round {gain('mesa-some', 'sgd-some')}."
    noisy = under_noise(NOISY, seeds)
    claims = [
        step_time(
            "mesa-saf",
            1.2,
            "a step takes 1.18 times as long (up to 1.2)",
            finding="On a CPU the average's forward pass costs a third of a step.",
        ),
        flatter(mesa, sgd, 0.8, averages),
        more_accurate(mesa, sgd, others),
        robust(noisy, "mesa", 0.8),
    ]
    return claims, {**rows, **{f"noise: {name}": found for name, found in noisy.items()}}
