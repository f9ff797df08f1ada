"""Do few tuned parameters of a frozen transformer do as well as all of them, and what does a step keep in memory?

The test digits are the same for all seeds; which labels there are, and the pretrained base, are each seed's own. Each
kind's rate is the best of three on digits that are held out for that choice, under seeds that are not measured:

    python benchmarks/claims visual-tuning            # measure
    python benchmarks/claims/visual_tuning.py         # choose the rates again, for the scenario's variants
"""

from __future__ import annotations

import itertools
import tempfile
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import Claim, Verdict, compare, paired, spread
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from trellis import scenario
from trellis.data.base import Batch
from trellis.data.loading import load_data
from trellis_clients.site import Cell, Site
from trellis_clients.trainers.efficiency._memory import bytes_alive
from trellis_clients.trainers.tuning._base import BaseConfig, frozen_base

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "visual-tuning.yaml"
WAYS = ("prompt", "adapter", "parameter", "remapping")
MOST = 0.10
"""Share of the model that may be tuned."""
NEAR = 1.0
"""Points of accuracy below full tuning that still count as equal."""

RATES = {
    "linear": (0.005, 0.02, 0.05),
    "prompt": (0.005, 0.02, 0.05),
    "adapter": (0.005, 0.01, 0.02),
    "parameter": (0.005, 0.01, 0.02),
    "remapping": (0.005, 0.01, 0.02),
    "full": (0.0005, 0.001, 0.002),
}
"""What each kind's rate is chosen from."""
CHOOSING = (100, 101)
"""Seeds that the choice is made under."""

TARGET = (8, 9)
"""Digits that the clients learn where bases are compared, from as many labels of each as in the scenario."""
BASES = {"0 to 4": (0, 1, 2, 3, 4), "0 to 7": (0, 1, 2, 3, 4, 5, 6, 7)}
EPOCHS = (8, 30, 100)


def measure(seeds: int = 6) -> tuple[list[Claim], dict[str, Any]]:
    cells = compare(SCENARIO, seeds=range(seeds))
    accuracy = {name: [100 * cell.last("central", "accuracy") for cell in each] for name, each in cells.items()}
    shares = {name: each[0].last("train", "tuned-share") for name, each in cells.items()}
    gains = {way: paired(accuracy[way], accuracy["linear"]) for way in WAYS}
    said = "; ".join(f"{way} {spread(gains[way], sign=True)} ({100 * shares[way]:.1f} % tuned)" for way in WAYS)
    best = max((way for way in WAYS if shares[way] <= MOST), key=lambda way: mean(accuracy[way]))
    behind = paired(accuracy[best], accuracy["full"])
    gaining = sum(mean(gain) > 0 for gain in gains.values())
    kept = memory(seeds)
    pixels = [100 * on_pixels(seed) for seed in range(seeds)]
    bases = by_base()
    claims = [
        Claim(
            "each way of tuning a frozen transformer beats training the head alone",
            "linear probe",
            f"{said}; linear {spread(accuracy['linear'])} %, {seeds} seeds",
            "held" if gaining == len(WAYS) else "in part" if gaining else "not held",
        ),
        Claim(
            f"the best of four is within {NEAR:g} point of full tuning with at most {100 * MOST:.0f} % of the weights",
            "full tuning",
            f"{best} {spread(accuracy[best])} against {spread(accuracy['full'])} %: "
            f"{spread(behind, sign=True)} points, {ratio(accuracy[best], accuracy['full']):.1f} times the errors",
            near(behind),
            f"Nor does anything here come near a logistic regression on bare pixels ({spread(pixels)} %). "
            f"{said_of(bases)}",
        ),
        ladder(kept),
    ]
    return claims, {"accuracy": accuracy, "bases": bases, "kB alive": kept}


def near(behind: list[float]) -> Verdict:
    """Held if the mean is near enough, in part if it is three times as far."""
    return "held" if mean(behind) >= -NEAR else "in part" if mean(behind) >= -3 * NEAR else "not held"


def ratio(a: list[float], b: list[float]) -> float:
    """Return how many times the errors of accuracies ``b`` (in percent) those of ``a`` are, over all seeds together."""
    return (100 - mean(a)) / max(100 - mean(b), 1e-9)


# -- rates ---------------------------------------------------------------------------------------------------


def variants() -> dict[str, dict[str, Any]]:
    """Return the trainer of every variant of the scenario."""
    return {name: scenario.plain(each)["trainer"] for name, each in scenario.expand(scenario.load(SCENARIO))}


def choose() -> dict[str, float]:
    """Return the best rate of each kind on the validation digits, and print the accuracies of all."""
    own, chosen = variants(), {}
    tried = {
        f"{kind}-{number}": {"trainer": {**own[kind], "lr": rate}}
        for kind, rates in RATES.items()
        for number, rate in enumerate(rates)
    }
    cells = compare(SCENARIO, tried, CHOOSING, ["data.judged_on=validation"])
    for kind, rates in RATES.items():
        found = [
            [100 * cell.last("central", "accuracy") for cell in cells[f"{kind}-{number}"]]
            for number in range(len(rates))
        ]
        chosen[kind] = rates[max(range(len(rates)), key=lambda number: mean(found[number]))]
        said = ", ".join(f"{rate:g}: {spread(each)}" for rate, each in zip(rates, found, strict=True))
        print(f"{kind:10} {chosen[kind]:g}   ({said})", flush=True)
    return chosen


# -- how much of it is the base's -----------------------------------------------------------------------------


def by_base(seeds: int = 4) -> list[dict[str, Any]]:
    """Return accuracies of adapters and of full tuning for the same two digits and labels on six bases.

    A base is one pretraining, the same under all seeds; the seeds draw the labels.
    """
    own = variants()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="trellis-bases-") as folder:
        for (name, digits), epochs in itertools.product(BASES.items(), EPOCHS):
            data = {**scenario.plain(scenario.load(SCENARIO))["data"], "base_digits": [*digits]}
            data["client_digits"] = [*TARGET]
            weights = Path(folder) / f"{digits[-1]}-{epochs}.safetensors"
            pretrain(data, epochs, weights)
            base = {"trainer": {"base": {"weights": str(weights)}}, "data": data}
            tried = {
                kind: {**base, "trainer": {**own[kind], **base["trainer"]}}  # type: ignore[dict-item]
                for kind in ("adapter", "full")
            }
            cells = compare(SCENARIO, tried, range(seeds))
            found = {kind: [100 * cell.last("central", "accuracy") for cell in each] for kind, each in cells.items()}
            rows.append({"base": name, "epochs": epochs, **found})
            print(rows[-1], flush=True)
    return rows


def pretrain(data: dict[str, Any], epochs: int, path: Path) -> None:
    """Pretrain the scenario's model on the base digits and write it to a file."""
    plain = scenario.plain(scenario.load(SCENARIO, ["trainer.base.epochs=0", "variants={}"]))
    site = Site(Cell(scenario.plain(scenario.from_mapping({**plain, "data": data})), 0))
    lr = variants()["full"]["base"]["lr"]
    encoder = frozen_base(site.trainer.task, BaseConfig(epochs=epochs, lr=lr))
    save_file({name: v.clone() for name, v in encoder.model.state_dict().items()}, path)  # type: ignore[union-attr,operator]


def said_of(rows: list[dict[str, Any]]) -> str:
    """Say what base and pretraining change where the task is fixed."""
    parts = []
    for name in BASES:
        each = [row for row in rows if row["base"] == name]
        gaps = ", ".join(
            f"{spread(paired(row['adapter'], row['full']), sign=True)} ({mean(row['full']):.1f} % full)" for row in each
        )
        parts.append(f"on a base of digits {name} adapters are {gaps} points from full tuning")
    epochs = ", ".join(map(str, EPOCHS))
    return (
        f"With the task fixed (digits {TARGET[0]} and {TARGET[1]}, the same labels) and only the base changed: "
        f"{'; '.join(parts)}, after {epochs} epochs of pretraining."
    )


# -- memory and pixels ------------------------------------------------------------------------------------------


def ladder(kept: dict[str, list[float]]) -> Claim:
    """Return the claim about what is kept for the backward pass."""
    told = {way: spread(each, 0) for way, each in kept.items()}
    return Claim(
        "a ladder keeps less for the backward pass than other ways, as nothing of the encoder is kept",
        "LoRA on queries and values",
        f"{told['remapping']} against {told['parameter']} kB alive after the forward pass of a step of 20 images "
        f"(prompts {told['prompt']}, adapters {told['adapter']}, all weights {told['full']})",
        "held" if max(kept["remapping"]) < min(min(kept[way]) for way in WAYS[:3]) else "not held",
    )


def memory(seeds: int) -> dict[str, list[float]]:
    """Return the kB that are alive after the forward pass of a step on 20 images, by variant and seed, untrained."""
    kept: dict[str, list[float]] = {}
    for (name, each), seed in itertools.product(
        scenario.expand(scenario.load(SCENARIO, ["trainer.base.epochs=0"])), range(seeds)
    ):
        site = Site(Cell(scenario.plain(each), seed))
        batch = site.federation.data.train.batch(torch.arange(20))
        model = site.model.train()
        kept.setdefault(name, []).append(bytes_alive(partial(forward, model, batch)) / 1000)
    return kept


def forward(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.x), batch.y)


def on_pixels(seed: int) -> float:
    """Return the accuracy of a logistic regression on the labelled images of a seed, all clients' together."""
    data = load_data(scenario.load(SCENARIO), seed)
    train, test = (split.batch(torch.arange(len(split))) for split in (data.train, data.test))
    fitted = LogisticRegression(max_iter=2000).fit(train.x.flatten(1).numpy(), train.y.numpy())
    return float(fitted.score(test.x.flatten(1).numpy(), test.y.numpy()))


if __name__ == "__main__":
    choose()
