"""ESAM's step time, sharpness and accuracy under FedAvg, and which of its two parts they come from.

python benchmarks/claims esam
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from _sharpness import COMMON, flatter, more_accurate, robust, run, step_time, trainer, under_noise, values
from common import Claim, paired, spread

VARIANTS = {
    "sgd": trainer("sgd"),
    "sam": trainer("sam"),
    "esam": trainer("esam"),
    "perturbed": trainer("esam", gamma=1.0),  # stochastic weight perturbation alone
    "selected": trainer("esam", beta=1.0, rho=0.001),  # data selection alone, in a ball of next to no size
    "selected-half": trainer("esam", beta=1.0, rho=0.001, lr=COMMON["lr"] / 2),
    "esam-half": trainer("esam", lr=COMMON["lr"] / 2),
    "sgd-double": trainer("sgd", lr=COMMON["lr"] * 2),
}
NOISY: dict[str, dict[str, Any]] = {"sgd": {"name": "sgd"}, "esam": {"name": "esam"}, "SAM": {"name": "sam"}}


def measure(seeds: int = 5) -> tuple[list[Claim], dict[str, list[dict[str, float]]]]:
    rows = run(VARIANTS, seeds)
    sgd, esam = rows["sgd"], rows["esam"]
    parts = {name: mean(values(rows[name], "eigenvalue")) / mean(values(sgd, "eigenvalue")) for name in rows}
    alone = (
        f"The eigenvalue's ratio with perturbation alone {parts['perturbed']:.2f}, with selection alone (rho 0.001) "
        f"{parts['selected']:.2f}; selection acts like a higher learning rate: alone at half the rate "
        f"{parts['selected-half']:.2f}, SGD at twice the rate {parts['sgd-double']:.2f}. ESAM at half the rate: "
        f"{parts['esam-half']:.2f}."
    )
    beside = paired(values(esam, "accuracy"), values(rows["sam"], "accuracy"))
    passes = "Where backward costs two forwards, its passes add up to 1 + (1 + 0.6) + 1 + 0.5 · 3 forwards over 3: 1.7."
    noisy = under_noise(NOISY, seeds)
    claims = [
        step_time("esam", 1.45, "a step takes about 1.4 times as long", finding=passes),
        flatter(esam, sgd, 0.7, alone),
        more_accurate(esam, sgd, f"Against SAM {spread(beside, sign=True)}."),
        robust(noisy, "esam", 0.7),
    ]
    return claims, {**rows, **{f"noise: {name}": found for name, found in noisy.items()}}
