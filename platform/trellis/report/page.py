"""What the page of one run says, section by section, as plain values for the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from math import inf, isfinite
from typing import Any

from trellis.report import calibration, charts, clients, costs, figures, reading, units
from trellis.report.charts import Line
from trellis.report.figures import Series, Spread
from trellis.report.reading import Run
from trellis.report.svg import Format

Section = dict[str, Any]
SOURCES = {
    "central": "central evaluation",
    "federated": "evaluation on the clients' own test data",
    "train": "training on the clients",
}
MAX_TILES = 4
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
        "clients": clients.clients(series, name),
        "calibration": calibration.section(series),
        "partitions": clients.partitions(series),
        "cost": costs.cost(series),
        "overhead": costs.overhead(run, series),
        "failures": clients.failures(run.cells),
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
