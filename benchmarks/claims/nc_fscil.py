"""NC-FSCIL: a fixed simplex classifier against a learnable one, few-shot sessions on digits.

python benchmarks/claims nc-fscil
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from common import Cell, Claim, Verdict, compare, paired, spread

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "nc-fscil.yaml"
OVERRIDES = ["evaluation.federated_every=0"]
BASE_ROUNDS = 6
HEADS = {"simplex": "etf", "learnable": "learnable"}
RATES = (0.003, 0.01, 0.03, 0.05)
"""Of the sessions, tried for both heads on the seeds below; the scenario's is 0.01."""
TUNING_SEEDS = (100, 101, 102)
"""Left out of what is measured."""
AHEAD = 2.0
"""Points of accuracy over all ten digits that were expected."""


def measure(seeds: int = 5) -> tuple[list[Claim], dict[str, Any]]:
    tried = tune()
    best = {head: max(RATES, key=lambda rate, of=of: mean(of[rate])) for head, of in tried.items()}
    cells = compare(SCENARIO, variants(best), range(seeds), OVERRIDES)
    final, novel = ({name: points(of, key) for name, of in cells.items()} for key in ("accuracy", "accuracy-novel"))
    drops = {name: lost(of) for name, of in cells.items()}

    def gain(of: dict[str, list[float]], suffix: str = "") -> list[float]:
        return paired(of[f"simplex{suffix}"], of[f"learnable{suffix}"])

    alike, tuned = gain(final), gain(final, "-tuned")
    mixing = {head: paired(final[head], final[f"{head}-unmixed"]) for head in HEADS}
    aligned = [cell.lines[BASE_ROUNDS]["central"]["alignment"] for cell in cells["simplex"]]
    claims = [
        Claim(
            f"after two sessions of 2 new digits, 5 images each a client: {AHEAD:g} points more accuracy over all ten"
            " digits",
            "a learnable linear head with cross-entropy, the same memory and steps; both at one rate, and each at the"
            f" best of {len(RATES)} rates on {len(TUNING_SEEDS)} seeds left out",
            f"{spread(alike, unit='points', sign=True)}: {spread(final['simplex'])} against"
            f" {spread(final['learnable'])}, on new digits {spread(novel['simplex'])} against"
            f" {spread(novel['learnable'])}; each at its own rate ({best['simplex']:g} and {best['learnable']:g})"
            f" {spread(tuned, sign=True)}: {spread(final['simplex-tuned'])} against {spread(final['learnable-tuned'])};"
            f" {seeds} seeds",
            ahead(alike, tuned),
            f"Mixing features gives the simplex {spread(mixing['simplex'], sign=True)} points and the learnable layer"
            f" {spread(mixing['learnable'], sign=True)}; without it they are at {spread(final['simplex-unmixed'])} and"
            f" {spread(final['learnable-unmixed'])}. At a rate of 0.03 they are at {spread(final['simplex-fast'])} and"
            f" {spread(final['learnable-fast'])}.",
        ),
        Claim(
            "base digits lose no more accuracy from the base session to the last",
            "the same",
            f"{spread(drops['simplex'])} points against {spread(drops['learnable'])}, paired"
            f" {spread(gain(drops), sign=True)}; each at its own rate {spread(drops['simplex-tuned'])} against"
            f" {spread(drops['learnable-tuned'])}, paired {spread(gain(drops, '-tuned'), sign=True)}; mean cosine with"
            f" the own vertex after the base session {spread(aligned, 2)} (held-out digits)",
            no_more(gain(drops), gain(drops, "-tuned")),
        ),
    ]
    details = {
        "by_seed": {
            name: {"accuracy": final[name], "accuracy-novel": novel[name], "base-drop": drops[name]} for name in cells
        },
        "alignment": aligned,
        "tuning": {head: {f"{rate:g}": of[rate] for rate in RATES} for head, of in tried.items()},
    }
    return claims, details


def tune() -> dict[str, dict[float, list[float]]]:
    """Return the last accuracy of each head at each rate of the sessions, by seed, on seeds left out."""
    wanted = {
        f"{head}-{rate:g}": {"trainer": {"classifier": classifier, "session_lr": rate}}
        for head, classifier in HEADS.items()
        for rate in RATES
    }
    cells = compare(SCENARIO, wanted, TUNING_SEEDS, OVERRIDES)
    return {head: {rate: points(cells[f"{head}-{rate:g}"], "accuracy") for rate in RATES} for head in HEADS}


def variants(best: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return each head as the scenario has it, at its best rate, at a rate of 0.03, and without mixed features."""
    changes = {head: {"": {}, "-tuned": {"session_lr": rate}} for head, rate in best.items()}
    return {
        f"{head}{suffix}": {"trainer": {"classifier": HEADS[head], **change}}
        for head, own in changes.items()
        for suffix, change in {**own, "-fast": {"session_lr": 0.03}, "-unmixed": {"mix": 0.0}}.items()
    }


def points(cells: list[Cell], name: str) -> list[float]:
    return [100 * cell.last("central", name) for cell in cells]


def lost(cells: list[Cell]) -> list[float]:
    """Return the points of accuracy on base digits that went between the base session and the last round."""
    before = [100 * cell.lines[BASE_ROUNDS]["central"]["accuracy-base"] for cell in cells]
    return paired(before, points(cells, "accuracy-base"))


def ahead(alike: list[float], tuned: list[float]) -> Verdict:
    """Held if both means reach what was expected, not held if either is not above zero."""
    least = min(mean(alike), mean(tuned))
    return "held" if least >= AHEAD else "in part" if least > 0 else "not held"


def no_more(alike: list[float], tuned: list[float]) -> Verdict:
    """Held if both means are at most zero, in part if one is."""
    return ("not held", "in part", "held")[(mean(alike) <= 0) + (mean(tuned) <= 0)]
