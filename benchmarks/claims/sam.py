"""SAM's step time, sharpness and accuracy under FedAvg, and whether what it flattens is the local or the global loss.

python benchmarks/claims sam
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from _sharpness import flatter, more_accurate, robust, run, step_time, trainer, under_noise, values
from common import Claim, paired, spread

EVEN = {"partition": {"name": "iid"}}
VARIANTS = {
    "sgd": trainer("sgd"),
    "sam": trainer("sam"),
    "sam-0.1": trainer("sam", rho=0.1),
    "sam-0.2": trainer("sam", rho=0.2),
    "sgd-lr-0.2": trainer("sgd", lr=0.2),
    "sgd-even": {**trainer("sgd"), **EVEN},
    "sam-even": {**trainer("sam"), **EVEN},
    "sam-0.2-even": {**trainer("sam", rho=0.2), **EVEN},
}
NOISY: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd"},
    "sam": {"name": "sam"},
    "rho 0.2": {"name": "sam", "rho": 0.2},
}


def measure(seeds: int = 5) -> tuple[list[Claim], dict[str, list[dict[str, float]]]]:
    rows = run(VARIANTS, seeds)
    sgd, sam = rows["sgd"], rows["sam"]

    def ratio(name: str, key: str, base: str = "sgd") -> float:
        return mean(values(rows[name], key)) / mean(values(rows[base], key))

    wider, local = (
        ", ".join(f"{ratio(name, key):.2f}" for name in ("sam", "sam-0.1", "sam-0.2"))
        for key in ("eigenvalue", "local_eigenvalue")
    )
    found = (
        f"The eigenvalue's ratio at rho 0.05, 0.1 and 0.2: {wider}; of the clients' own losses after a turn: {local}. "
        f"Without skew {ratio('sam-even', 'eigenvalue', 'sgd-even'):.2f} at rho 0.05, "
        f"{ratio('sam-0.2-even', 'eigenvalue', 'sgd-even'):.2f} at 0.2. SGD at twice the learning rate: "
        f"{ratio('sgd-lr-0.2', 'eigenvalue'):.2f}."
    )
    even = spread(paired(values(rows["sam-even"], "accuracy"), values(rows["sgd-even"], "accuracy")), sign=True)
    noisy = under_noise(NOISY, seeds)
    claims = [
        step_time("sam", 2.2, "a step takes about twice as long (1.8 to 2.2)", at_least=1.8),
        flatter(sam, sgd, 0.6, found),
        more_accurate(sam, sgd, f"Without skew {even}."),
        robust(noisy, "sam", 0.6),
    ]
    return claims, {**rows, **{f"noise: {name}": found for name, found in noisy.items()}}
