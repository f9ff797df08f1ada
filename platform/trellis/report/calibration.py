"""The page's section on a classifier that was calibrated after the last round: both heads side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trellis.report import charts, figures, reading, units
from trellis.report.figures import Series
from trellis.report.reading import Cell, Row

MAX_CLASSES = 20


def section(series: Sequence[Series]) -> dict[str, Any] | None:
    """Return accuracies and weight norms before and after, per variant and per class; None where none was calibrated.

    Reads what the strategy's last step wrote under ``finish``: ``accuracy-before`` and ``-after``, with lists
    ``class-accuracy-…`` beside ``tested-classes``, ``weight-norms-…``, ``clients-…`` and ``bytes-…``.
    """
    steps = [(index, each, found) for index, each in enumerate(series) if (found := _steps(each.cells))]
    if not steps:
        return None
    names = next((cell.partition.classes for _, each, _ in steps for cell in each.cells if cell.partition), ())
    classes = sorted(
        {int(label) for _, _, found in steps for step in found for label in _numbers(step, "tested-classes")}
    )
    rows, by_class = [], []
    for index, each, found in steps:
        before, after = (
            [reading.finite(step.get(f"accuracy-{when}")) for step in found] for when in ("before", "after")
        )
        gains = [b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None]
        gain = figures.spread(gains)
        rows.append(
            {
                "slot": charts.slot(index),
                "label": each.label,
                "before": _mean(before),
                "after": _mean(after),
                "gain": _points(gain) if gain else units.NONE,
                "norms": [_norms(found, when) for when in ("before", "after")],
                "used": _counted(found, "clients-used"),
                "refused": sum(len(_numbers(step, "clients-refused")) for step in found),
                "bytes": units.size(
                    float(
                        np.mean(
                            [
                                sum(reading.finite(step.get(f"bytes-{way}")) or 0 for way in ("up", "down"))
                                for step in found
                            ]
                        )
                    )
                ),
            }
        )
        for when in ("before", "after"):
            values = [_of_class(found, when, label) for label in classes[:MAX_CLASSES]]
            by_class.append({"slot": charts.slot(index), "label": each.label, "when": when, "values": values})
    return {
        "rows": rows,
        "classes": [names[label] if label < len(names) else str(label) for label in classes[:MAX_CLASSES]],
        "by_class": by_class if classes else [],
        "hidden": max(len(classes) - MAX_CLASSES, 0),
    }


def _steps(cells: Sequence[Cell]) -> list[Row]:
    """Return what the last step of every cell wrote, of cells that were calibrated and tested."""
    found = [cell.rounds[-1].get("finish") for cell in cells if cell.rounds]
    return [
        step for step in found if isinstance(step, Mapping) and reading.finite(step.get("accuracy-after")) is not None
    ]


def _numbers(step: Row, name: str) -> list[float]:
    values = step.get(name)
    return [v for v in map(reading.finite, values) if v is not None] if isinstance(values, list) else []


def _mean(values: Sequence[float | None]) -> str:
    spread = figures.spread(values)
    return units.plus_minus("accuracy", spread.mean, spread.sd) if spread else units.NONE


def _points(gain: figures.Spread) -> str:
    sd = f" ± {100 * gain.sd:.2f}" if gain.sd is not None else ""
    return f"{100 * gain.mean:+.2f}{sd}"


def _norms(found: Sequence[Row], when: str) -> str:
    """Return the smallest and largest norm of the head's rows, mean over seeds."""
    every = [norms for step in found if (norms := _numbers(step, f"weight-norms-{when}"))]
    if not every:
        return units.NONE
    low, high = (float(np.mean([pick(norms) for norms in every])) for pick in (min, max))
    return f"{units.number(low, 3)} to {units.number(high, 3)}"


def _counted(found: Sequence[Row], name: str) -> str:
    counts = sorted({len(_numbers(step, name)) for step in found})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _of_class(found: Sequence[Row], when: str, label: int) -> str:
    values = []
    for step in found:
        at = dict(zip(_numbers(step, "tested-classes"), _numbers(step, f"class-accuracy-{when}"), strict=False))
        values.append(at.get(label))
    spread = figures.spread(values)
    return units.percent(spread.mean) if spread else units.NONE
