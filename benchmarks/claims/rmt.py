"""Does a robust mean teacher gain on a stream that never resets, and does replay keep it good at clean images?

python benchmarks/claims rmt
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from common import Cell, Claim, Verdict, compare, paired, spread

from trellis.runs import CellFolder, read_lines
from trellis.scenario import Scenario

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "rmt.yaml"
AHEAD = 1.0
"""Points ahead of batch statistics in the second pass."""


def measure(seeds: int = 5) -> list[Claim]:
    """Run the scenario under seeds from 1; seed 0 served to choose its severity."""
    cells = compare(SCENARIO, seeds=range(1, 1 + seeds), also=clean)
    again = {name: [second_pass(cell) for cell in each] for name, each in cells.items()}
    kept = {name: [cell.extra["clean"] for cell in cells[name]] for name in ("rmt", "replay")}
    over_norm, over_plain = (paired(again["rmt"], again[name]) for name in ("batch-norm", "mean-teacher"))
    replayed = paired(kept["replay"], kept["rmt"])
    return [
        Claim(
            f"the second time round the corruptions it is at least {AHEAD:g} point ahead, without a reset",
            "prediction-time batch norm",
            f"{spread(again['rmt'])} against {spread(again['batch-norm'])} % (source model {spread(again['source'])}): "
            f"{spread(over_norm, sign=True)} points, {seeds} seeds",
            verdict(over_norm, AHEAD),
        ),
        Claim(
            "symmetric cross-entropy and prototypes are worth more than a plain mean teacher",
            "the same student and teacher, one-sided cross-entropy, no contrast",
            f"{spread(again['rmt'])} against {spread(again['mean-teacher'])} %: {spread(over_plain, sign=True)} points",
            verdict(over_plain, 0.0),
        ),
        Claim(
            "replay of labelled source images keeps it at least as good on clean ones after the stream",
            "the same without replay",
            f"{spread(kept['replay'])} against {spread(kept['rmt'])} % on the stream's images before their harm: "
            f"{spread(replayed, sign=True)} points",
            verdict(replayed, 0.0),
            "" if mean(replayed) >= 0 else "Without replay nothing was forgotten in a stream of this length.",
        ),
    ]


def second_pass(cell: Cell) -> float:
    """Return the share of right answers, in percent, in the second half of the rounds."""
    rounds = [line["train"]["round-accuracy"] for line in cell.lines if line["train"]]
    return 100 * mean(rounds[len(rounds) // 2 :])


def verdict(gains: list[float], threshold: float) -> Verdict:
    """Held if the mean reaches the threshold, in part if some seed does."""
    return "held" if mean(gains) >= threshold else "in part" if max(gains) >= threshold else "not held"


def clean(_: Scenario, folder: CellFolder) -> dict[str, Any]:
    """Return the students' mean accuracy on unharmed images after the last round, where there are students."""
    rows = [row["metrics"] or {} for row in read_lines(folder.path / "clients.jsonl")]
    found = [100 * row["clean-accuracy"] for row in rows if "clean-accuracy" in row]
    return {"clean": mean(found)} if found else {}
