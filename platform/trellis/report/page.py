"""What the page of one run says, section by section, as plain values for the template."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from math import inf, isfinite
from typing import Any

import numpy as np

from trellis.report import calibration, charts, figures, reading, units
from trellis.report.charts import Dot, Line
from trellis.report.figures import REST, Series, Spread
from trellis.report.reading import Cell, Failure, Row, Run
from trellis.report.svg import Format

Section = dict[str, Any]
SOURCES = {
    "central": "central evaluation",
    "federated": "evaluation on the clients' own test data",
    "train": "training on the clients",
}
PHASE_COLOURS = {
    "train": "s0",
    "evaluate": "s2",
    "central": "s5",
    "aggregate": "s4",
    "sample": "s3",
    "checkpoint": "s1",
}
MAX_TILES = 4
MAX_PICTURES = 4
MAX_NAMES = 12
MAX_FAILURES = 50
MAX_METRICS = 4


def context(run: Run) -> Section:
    """Return all that ``page.html.j2`` shows of a run."""
    series = figures.series_of(run)
    source, name = figures.main_metric(run.cells)
    return {
        "run": run,
        "description": run.scenario.get("description") or "",
        "place": "/".join(run.folder.resolve().parts[-3:]),
        "when": when(str(run.environment.get("started") or run.finished)),
        "series": legend(series),
        "seeds": sorted({cell.seed for cell in run.cells if cell.seed is not None}),
        "headline": headline(series, source, name),
        "facts": facts(run),
        "learning": learning(series, source, name),
        "clients": clients(series, name),
        "calibration": calibration.section(series),
        "partitions": partitions(series),
        "cost": cost(series),
        "overhead": overhead(run, series),
        "failures": failures(run.cells),
        "results": results(series, name),
        "environment": list(flat(run.environment).items()),
    }


def legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Return each series' colour classes and label."""
    return [(charts.slot(index), each.label) for index, each in enumerate(series)]


def headline(series: Sequence[Series], source: str, name: str) -> Section:
    """Return the main metric's final value of each series: the first things a reader looks for."""
    found = [
        (charts.slot(index), each, spread)
        for index, each in enumerate(series)
        if (spread := figures.spread(figures.final(cell, source, name) for cell in each.cells))
    ]
    # A series that diverged is never the best, whichever way is up.
    sign = -1 if figures.lower_is_better((cell for each in series for cell in each.cells), name) else 1
    order = sorted(found, key=lambda tile: sign * tile[2].mean if isfinite(tile[2].mean) else -inf, reverse=True)
    shown = found if len(found) <= MAX_TILES else order[:1]
    return {
        "title": f"Final {source} {name}" if name else "",
        "best_of": len(found) if len(found) > MAX_TILES else 0,
        "tiles": [
            {
                "slot": slot,
                "label": each.label if len(series) > 1 else "",
                "value": units.metric(name, spread.mean),
                "note": _note(name, spread, sum(not cell.summary for cell in each.cells)),
            }
            for slot, each, spread in shown
        ],
    }


def _note(name: str, spread: Spread, unfinished: int) -> str:
    seeds = "one seed" if spread.count == 1 else f"{spread.count} seeds"
    if unfinished:
        seeds += ", unfinished" if spread.count == unfinished == 1 else f", {unfinished} unfinished"
    if spread.sd is None:
        return seeds
    sd = f"{100 * spread.sd:.2f}" if units.is_share(name) else units.number(spread.sd, 2)
    return f"± {sd} (sd of {seeds})"


def _rounds(shown: str, done: int, planned: float | None) -> str:
    if planned is None or done == planned:
        return shown
    # A strategy with a step after the last round writes it down as one round more.
    return f"{planned:,.0f} and a last step" if done > planned else f"{shown} of {planned:,.0f}"


def facts(run: Run) -> list[tuple[str, str]]:
    """Return the run's size in a few numbers."""
    planned = reading.finite(reading.at(run.scenario, "rounds", "count"))
    done = min((figures.rounds_done(cell) for cell in run.cells), default=0)
    most = max((figures.rounds_done(cell) for cell in run.cells), default=0)
    rounds = f"{done:,}" if done == most else f"{done:,} to {most:,}"
    sizes = [len(cell.partition.counts) for cell in run.cells if cell.partition]
    pooled = figures.pooled_overhead(run.cells)
    return [
        ("rounds", _rounds(rounds, done, planned)),
        *([("clients", f"{max(sizes):,}")] if sizes else []),
        ("wall time, all cells", units.duration(figures.total(run.cells, "seconds"))),
        ("sent down", units.size(figures.total(run.cells, "bytes_down"))),
        ("sent up", units.size(figures.total(run.cells, "bytes_up"))),
        ("overhead R", units.number(pooled.ratio, 3) if pooled else "not measured"),
    ]


def learning(series: Sequence[Series], source: str, name: str) -> Section:
    """Return the curves against rounds and bytes."""
    cells = [cell for each in series for cell in each.cells]
    names = [name, *(["loss"] if name != "loss" and "loss" in figures.metric_names(cells, source) else [])]
    pictures = []
    for metric in names if name else []:
        curves = [figures.curve(each.cells, partial(figures.value, source=source, name=metric)) for each in series]
        pictures.append(
            (
                f"{metric.capitalize()} by round",
                _lines(series, curves, metric, "round", str_whole, f"{source} {metric}"),
            )
        )
    if name and any(figures.total(each.cells, "bytes_up") for each in series):
        curves_b = [figures.against_bytes(each.cells, source, name) for each in series]
        chart = _lines(series, curves_b, name, "sent up and down", units.size, f"{source} {name}")
        pictures.append((f"{name.capitalize()} by bytes sent", chart))
        pictures.append(("Bytes by round", _bytes(series)))
    points = max((len(cell.rounds) for cell in cells), default=0)
    return {
        "source": SOURCES.get(source, ""),
        "pictures": pictures,
        "missing": [SOURCES[s] for s in ("central", "federated") if cells and not figures.metric_names(cells, s)],
        "several_seeds": any(len(each.cells) > 1 for each in series),
        "uneven": any(len({figures.rounds_done(cell) for cell in each.cells}) > 1 for each in series),
        "thinned": f"{points:,}" if points > figures.MAX_POINTS else "",
    }


def str_whole(value: float) -> str:
    return f"{value:,.0f}"


def _lines(
    series: Sequence[Series],
    curves: Sequence[Sequence[tuple[float, Spread]]],
    name: str,
    x: str,
    x_format: Format,
    label: str,
) -> str:
    made = [
        Line(
            each.label,
            [(at, spread.mean) for at, spread in points],
            [(at, spread.low, spread.high) for at, spread in points] if len(each.cells) > 1 else [],
        )
        for each, points in zip(series, curves, strict=True)
    ]
    ends = "; ".join(f"{line.label} ends at {units.metric(name, line.points[-1][1])}" for line in made if line.points)
    return charts.lines(
        made,
        f"{label} against {x}: {ends}.",
        x=x,
        y=name,
        x_format=x_format,
        y_format=(lambda v: units.percent(v, 0)) if units.is_share(name) else (lambda v: units.number(v, 3)),
        tip_format=lambda v: units.metric(name, v),
        share=units.is_share(name),
        whole=x == "round",
    )


def _bytes(series: Sequence[Series]) -> str:
    made = [
        Line(
            each.label,
            [(at, s.mean) for at, s in figures.curve(map(reading.after_start, each.cells), figures.bytes_of)],
        )
        for each in series
    ]
    return charts.lines(
        made,
        "Bytes per round, up and down together.",
        x="round",
        y="up and down",
        x_format=str_whole,
        y_format=units.size,
        zero=True,
        whole=True,
    )


def clients(series: Sequence[Series], main: str) -> Section | None:
    """Return how the last federated evaluation fell out over clients, and who fared worst."""
    names = list(
        dict.fromkeys(
            name
            for each in series
            for cell in each.cells
            for metrics in cell.evaluated.values()
            for name in metrics
            if name not in reading.COUNTS
        )
    )
    if not names:
        return None
    name = main if main in names else next((n for n in names if not n.endswith("loss")), names[0])
    low = figures.lower_is_better((cell for each in series for cell in each.cells), name)
    worst_first = -1 if low else 1
    most = MAX_NAMES if len(series) <= MAX_TILES else 4
    dots, rows = [], []
    for index, each in enumerate(series):
        values = [
            (metrics[name], f"client {client}" + (f" (seed {cell.seed})" if len(each.cells) > 1 else ""))
            for cell in each.cells
            for client, metrics in cell.evaluated.items()
            if reading.finite(metrics.get(name)) is not None
        ]
        values.sort(key=lambda pair: worst_first * pair[0])
        dots.append((each.label, [Dot(v, f"{each.label}, {who}: {units.metric(name, v)}") for v, who in values]))
        if not values:
            continue
        worst = values[: max(1, round(len(values) / 10))]
        spread = figures.spread(value for value, _ in values)
        assert spread is not None
        rows.append(
            {
                "slot": charts.slot(index),
                "label": each.label,
                "mean": units.plus_minus(name, spread.mean, spread.sd),
                "worst": units.metric(name, float(np.mean([value for value, _ in worst]))),
                "names": [f"{who} {units.metric(name, value, 1)}" for value, who in worst[:most]],
                "more": max(len(worst) - most, 0),
            }
        )
    rounds = sorted({c.evaluated_round for s in series for c in s.cells if c.evaluated_round is not None})
    chart = charts.distribution(
        dots,
        f"{name} of every client, sorted: "
        + "; ".join(f"{row['label']} {row['mean']}, worst tenth {row['worst']}" for row in rows),
        y=name,
        y_format=(lambda v: units.percent(v, 0)) if units.is_share(name) else (lambda v: units.number(v, 3)),
        share=units.is_share(name),
    )
    return {
        "name": name,
        "rounds": rounds,
        "chart": chart,
        "rows": rows,
        "worst_at": "right" if low else "left",
        "several_seeds": any(len(each.cells) > 1 for each in series),
    }


def partitions(series: Sequence[Series]) -> Section | None:
    """Return a picture of each distinct partition among the variants' first seeds."""
    groups: list[tuple[Cell, list[str]]] = []
    for each in series:
        cell = next((cell for cell in each.cells if cell.partition), None)
        if cell is None or cell.partition is None:
            continue
        for other, labels in groups:
            assert other.partition is not None
            if np.array_equal(other.partition.counts, cell.partition.counts):
                labels.append(each.label)
                break
        else:
            groups.append((cell, [each.label]))
    if not groups:
        return None
    pictures = []
    for cell, labels in groups[:MAX_PICTURES]:
        partition = cell.partition
        assert partition is not None
        sizes = partition.sizes
        counts, classes = partition.counts, partition.classes or ("all",) * partition.counts.shape[1]
        label = (
            f"Examples per client and class: {len(sizes)} clients hold {sizes.min()} to {sizes.max()} examples each."
        )
        fits = counts.shape[0] <= charts.MAX_BUBBLES[0] and counts.shape[1] <= charts.MAX_BUBBLES[1]
        pictures.append(
            {
                "title": ", ".join(labels) if len(groups) > 1 else "",
                "seed": cell.seed,
                "chart": (charts.bubbles if fits else charts.heat)(counts, classes, label),
                "heat": not fits,
                "clients": f"{len(sizes):,}",
                "classes": len(partition.classes),
                "held": f"{sizes.sum():,}",
                "least": f"{sizes.min():,}",
                "median": f"{np.median(sizes):,.1f}".removesuffix(".0"),
                "most": f"{sizes.max():,}",
                "per_client": units.number(float((counts > 0).sum(axis=1).mean()), 2),
            }
        )
    return {"pictures": pictures, "hidden": len(groups) - len(pictures)}


def cost(series: Sequence[Series]) -> Section | None:
    """Return bytes and seconds per round, the seconds by phase, and what no phase accounts for."""
    trained = {each.label: _trained(each.cells) for each in series}
    if not any(trained.values()):
        return None
    means = {label: figures.mean_phases(rows) for label, rows in trained.items() if rows}
    names = [name for name in dict.fromkeys(n for m in means.values() for n in m) if name != REST]
    classes = {name: PHASE_COLOURS.get(name, "s6") for name in names} | {REST: "rest"}
    stacks = {each.label: _stacks(each.cells) for each in [s for s in series if trained[s.label]][:MAX_PICTURES]}
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


def failures(cells: Sequence[Cell]) -> Section | None:
    """Return failures and refusals by client and reason, most frequent first."""
    every = [(cell, failure) for cell in cells for failure in cell.failures]
    if not every:
        return None
    rounds: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for _, each in every:
        rounds[each.client, each.phase, each.reason].append(each.round)
    order = sorted(rounds, key=lambda key: (-len(rounds[key]), _natural(key[0]), key))
    asked = sum(reading.finite(row.get("cohort")) or 0 for cell in cells for row in cell.rounds)
    return {
        "count": len(every),
        "train": _of_training([failure for _, failure in every]),
        "asked": f"{asked:,.0f}" if asked else "",
        "clients": len({each.client for _, each in every}),
        "rows": [(*key, len(rounds[key]), ranges(rounds[key])) for key in order[:MAX_FAILURES]],
        "more": max(len(order) - MAX_FAILURES, 0),
    }


def _of_training(every: Sequence[Failure]) -> int:
    return Counter(each.phase for each in every)["train"]


def _natural(client: str) -> tuple[int, str]:
    return (int(client) if client.isdecimal() else 2**63, client)


def ranges(rounds: Sequence[int], most: int = 6) -> str:
    """Return round numbers as ``1, 3–5, 9``; of many pieces only the first."""
    pieces: list[list[int]] = []
    for index in sorted(set(rounds)):
        if pieces and index == pieces[-1][-1] + 1:
            pieces[-1] = [pieces[-1][0], index]
        else:
            pieces.append([index])
    written = [f"{piece[0]}–{piece[-1]}" if len(piece) > 1 else str(piece[0]) for piece in pieces]
    return ", ".join(written[:most]) + (", …" if len(written) > most else "")


def results(series: Sequence[Series], main: str) -> Section:
    """Return the final metrics of every cell, and mean and standard deviation of every series."""
    cells = [cell for each in series for cell in each.cells]
    columns = []
    for source in ("central", "federated"):
        names = sorted(figures.metric_names(cells, source), key=lambda name: (name != main, name != "loss"))
        columns += [(source, name) for name in names[:MAX_METRICS]]
    rows = [
        {
            "slot": charts.slot(index),
            "label": each.label,
            "seed": units.NONE if cell.seed is None else cell.seed,
            "values": [units.metric(name, figures.final(cell, source, name)) for source, name in columns],
            "rounds": figures.rounds_done(cell),
            "seconds": units.duration(figures.total([cell], "seconds")),
            "sha": str(cell.summary.get("sha256") or "")[:12],
            "finished": bool(cell.summary),
        }
        for index, each in enumerate(series)
        for cell in each.cells
    ]
    means = [
        {
            "slot": charts.slot(index),
            "label": each.label,
            "count": len(each.cells),
            "values": [summed(each, source, name) for source, name in columns],
            "bytes": units.size(figures.total(each.cells, "bytes_up") + figures.total(each.cells, "bytes_down")),
            "seconds": units.duration(figures.total(each.cells, "seconds") / max(len(each.cells), 1)),
        }
        for index, each in enumerate(series)
    ]
    return {"columns": columns, "rows": rows, "means": means, "unfinished": sum(not c.summary for c in cells)}


def summed(each: Series, source: str, name: str) -> str:
    """Return a series' final metric as mean ± sample standard deviation."""
    spread = figures.spread(figures.final(cell, source, name) for cell in each.cells)
    return units.plus_minus(name, spread.mean, spread.sd) if spread else units.NONE


def flat(data: object, prefix: str = "") -> dict[str, object]:
    """Return nested mappings as one, keys joined by dots. Lists stay whole."""
    if not isinstance(data, Mapping):
        return {prefix: data}
    result: dict[str, object] = {}
    for key, value in data.items():
        result |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return result


def when(iso: str) -> str:
    """Return an ISO time as people write it; as it stands where it is none."""
    try:
        moment = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    zone = f" {moment.tzname()}" if moment.tzinfo else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"
