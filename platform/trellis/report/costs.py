"""What a run cost, as the page shows it: time by phase, bytes, and the overhead over bare training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trellis.report import charts, figures, reading, units
from trellis.report.figures import REST, Series
from trellis.report.reading import Cell, Row, Run

Section = dict[str, Any]
PHASE_COLOURS = {
    "train": "s0",
    "evaluate": "s2",
    "central": "s5",
    "aggregate": "s4",
    "sample": "s3",
    "checkpoint": "s1",
}


def cost(series: Sequence[Series]) -> Section | None:
    """Return bytes and seconds per round, the seconds by phase, and what no phase accounts for."""
    trained = {each.label: _trained(each.cells) for each in series}
    if not any(trained.values()):
        return None
    means = {label: figures.mean_phases(rows) for label, rows in trained.items() if rows}
    names = [name for name in dict.fromkeys(n for m in means.values() for n in m) if name != REST]
    classes = {name: PHASE_COLOURS.get(name, "s6") for name in names} | {REST: "rest"}
    stacks = {
        each.label: _stacks(each.cells) for each in [s for s in series if trained[s.label]][: charts.MAX_PICTURES]
    }
    top = max((sum(v for _, v in values) for s in stacks.values() for _, values in s), default=1.0)
    rows = []
    for index, each in enumerate(series):
        if not (mean := means.get(each.label)):
            continue
        seconds, count = sum(mean.values()), len(trained[each.label])
        rows.append(
            {
                "slot": charts.slot(index),
                "label": each.label,
                "seconds": units.duration(seconds),
                "shares": [units.percent(mean.get(n, 0.0) / seconds if seconds else 0.0) for n in [*names, REST]],
                "down": units.size(sum(reading.finite(r.get("bytes_down")) or 0 for r in trained[each.label]) / count),
                "up": units.size(sum(reading.finite(r.get("bytes_up")) or 0 for r in trained[each.label]) / count),
            }
        )
    pictures = [
        (label, charts.columns(s, classes, _spoken(label, means[label]), y="", y_format=units.duration, top=top))
        for label, s in stacks.items()
    ]
    return {
        "legend": [(classes[name], name) for name in [*names, REST]],
        "rows": rows,
        "pictures": pictures,
        "hidden": len(rows) - len(pictures),
        "grouped": any(len(_trained(c.cells)) and figures.rounds_done(c.cells[0]) > charts.MAX_COLUMNS for c in series),
    }


def _spoken(label: str, mean: Mapping[str, float]) -> str:
    return f"Seconds per round of {label} by phase; in the mean " + ", ".join(
        f"{name} {units.duration(seconds)}" for name, seconds in mean.items()
    )


def _trained(cells: Sequence[Cell]) -> list[Row]:
    """Return the rounds after round 0, which only evaluates."""
    return [row for cell in cells for row in reading.after_start(cell).rounds]


def _stacks(cells: Sequence[Cell]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Return one stack per round, mean over seeds; of many rounds, one per group of neighbours."""
    by_round: dict[int, list[Row]] = defaultdict(list)
    for row in _trained(cells):
        by_round[int(row["round"])].append(row)
    groups = np.array_split(sorted(by_round), min(len(by_round), charts.MAX_COLUMNS)) if by_round else []
    stacks = []
    for group in groups:
        name = str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}"
        stacks.append((name, list(figures.mean_phases([row for at in group for row in by_round[int(at)]]).items())))
    return stacks


def overhead(run: Run, series: Sequence[Series]) -> Section:
    """Return the framework's overhead in one sentence and by variant; or why it was not measured."""
    pooled = figures.pooled_overhead(run.cells)
    if pooled is None:
        every = reading.at(run.scenario, "probe", "every")
        if every == 0:
            why = "the scenario switches the probe off (probe.every is 0)"
        elif not run.cells or not any(_trained([cell]) for cell in run.cells):
            why = "no round was finished"
        else:
            why = "no round was replayed as a bare loop"
        return {"why": why, "rows": []}
    change = pooled.ratio - 1
    if abs(change) < 0.005:
        means = "a round takes as long as the same steps in a bare loop"
    elif change > 0:
        means = f"a round takes {units.percent(change)} longer than the same steps in a bare loop without the framework"
    else:
        means = f"a round takes {units.percent(-change)} less time than the same steps in a bare, sequential loop"
    rows = []
    for index, each in enumerate(series):
        one = figures.pooled_overhead(each.cells)
        rows.append((charts.slot(index), each.label, one and _overhead_row(one)))
    return {"why": "", "means": means, **_overhead_row(pooled), "rows": rows}


def _overhead_row(one: figures.Overhead) -> Section:
    known = one.low is not None and one.high is not None
    return {
        "ratio": units.number(one.ratio, 3),
        "range": f"{units.number(one.low, 3)} to {units.number(one.high, 3)}" if known else units.NONE,
        "cpu": units.number(one.cpu_ratio, 3),
        "samples": one.samples,
    }
