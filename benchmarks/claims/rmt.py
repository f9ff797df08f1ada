"""Does a robust mean teacher gain on a stream that never resets, and does replay keep it good at clean images?

python benchmarks/claims rmt
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common import Cell, Claim, Verdict, compare, paired, spread

from trellis.runs import CellFolder, read_lines
from trellis.scenario import Scenario

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "rmt.yaml"
AHEAD = 1.0
"""Points ahead of batch statistics in the second pass."""


def measure(seeds: int = 5) -> tuple[list[Claim], dict[str, Any]]:
    """Run the scenario under seeds from 1; seed 0 served to choose its severity."""
    cells = compare(SCENARIO, seeds=range(1, 1 + seeds), also=clean)
    again = {name: [second_pass(cell) for cell in each] for name, each in cells.items()}
    kept = {name: [cell.extra["student"] for cell in cells[name]] for name in ("rmt", "replay", "mean-teacher")}
    source = [cell.extra["source"] for cell in cells["rmt"]]
    over_norm, over_plain = (paired(again["rmt"], again[name]) for name in ("batch-norm", "mean-teacher"))
    replayed = paired(kept["replay"], kept["rmt"])
    claims = [
        Claim(
            f"the second time round the corruptions it is at least {AHEAD:g} point ahead, without a reset",
            "prediction-time batch norm",
            f"{spread(again['rmt'])} against {spread(again['batch-norm'])} % (source model {spread(again['source'])}): "
            f"{spread(over_norm, sign=True)} points, {seeds} seeds",
            verdict(over_norm, AHEAD),
        ),
        Claim(
            "symmetric cross-entropy and prototypes are worth more than a plain mean teacher",
            "the same student and teacher after the same symmetric warm-up; one-sided cross-entropy, no contrast",
            f"{spread(again['rmt'])} against {spread(again['mean-teacher'])} %: {spread(over_plain, sign=True)} points",
            verdict(over_plain, 0.0),
        ),
        Claim(
            "replay of labelled source images keeps it at least as good on clean ones after the stream",
            "the same without replay",
            f"{spread(kept['replay'])} against {spread(kept['rmt'])} % on the stream's images before their harm (the "
            f"untouched source model {spread(source)}): {spread(replayed, sign=True)} points",
            verdict(replayed, 0.0),
            within(replayed),
        ),
    ]
    clean_figures = {**kept, "source": source}
    return claims, {"seeds": list(range(1, 1 + seeds)), "second_pass": again, "clean": clean_figures}


def second_pass(cell: Cell) -> float:
    """Return the share of right answers, in percent, in the second half of the rounds."""
    rounds = [line["train"]["round-accuracy"] for line in cell.lines if line["train"]]
    return 100 * mean(rounds[len(rounds) // 2 :])


def verdict(gains: list[float], threshold: float) -> Verdict:
    """Held if the mean reaches the threshold, in part if some seed does."""
    return "held" if mean(gains) >= threshold else "in part" if max(gains) >= threshold else "not held"


def within(gains: list[float]) -> str:
    """Say so where a difference is no larger than its spread."""
    if len(gains) < 2 or abs(mean(gains)) > stdev(gains):
        return ""
    return (
        "The difference is no larger than its spread over seeds: after a stream of this length replay shows no effect."
    )


def clean(_: Scenario, folder: CellFolder) -> dict[str, Any]:
    """Return mean accuracies on unharmed images after the last round, of students and of their source model."""
    rows = [row["metrics"] or {} for row in read_lines(folder.path / "clients.jsonl")]
    last = [row for row in rows if "clean-accuracy" in row]
    names = {"student": "clean-accuracy", "source": "source-clean-accuracy"}
    return {key: 100 * mean(row[name] for row in last) for key, name in names.items()} if last else {}
