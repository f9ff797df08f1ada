"""The arithmetic of the report: means and spreads over seeds, curves, shares of time, overhead.

A ``Series`` is what one line of a chart stands for: a variant of a run, with one cell per seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from trellis.report import reading, units
from trellis.report.reading import Cell, Row, Run

MAX_POINTS = 400
PHASES = ("sample", "train", "aggregate", "evaluate", "central", "checkpoint")
REST = "unaccounted"

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for one value), extremes and number of some values.

    One value that is not finite makes them all so: a run that diverged must not vanish in a mean.
    """

    mean: float
    sd: float | None
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Series:
    """Cells that differ by their seed alone, under the name that legends and tables use."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Overhead:
    """Round time over the time of a bare loop of the same steps: median and interquartile range of paired ratios."""

    ratio: float
    low: float | None
    high: float | None
    cpu_ratio: float | None
    samples: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return the spread of the values that are there, or None if none is."""
    data = np.array([value for value in values if value is not None], dtype=np.float64)
    if not data.size:
        return None
    with np.errstate(all="ignore"):
        sd = float(data.std(ddof=1)) if data.size > 1 else None
        return Spread(float(data.mean()), sd, float(data.min()), float(data.max()), int(data.size))


def series_of(run: Run, label: str = "") -> list[Series]:
    """Return a run's variants as series; a run without variants is one series named ``label`` or by the scenario."""
    return [
        Series(
            f"{label} / {variant}" if label and variant else variant or label or run.name,
            tuple(cell for cell in run.cells if cell.variant == variant),
        )
        for variant in run.variants
    ]


def metric_names(cells: Iterable[Cell], source: str) -> list[str]:
    """Return the names of a source's metrics in order of first appearance."""
    return list(dict.fromkeys(name for cell in cells for row in cell.rounds for name in reading.metrics(row, source)))


def main_metric(cells: Sequence[Cell]) -> tuple[str, str]:
    """Choose what the page is about: ``(source, metric)``.

    The source is the central evaluation, else the federated one, else training. The metric is the trainer's own,
    else accuracy, else the first that is no loss, else the loss. Both are empty where nothing was measured.
    """
    for name in _declared(cells):
        for source in ("central", "federated", "train"):
            if name in metric_names(cells, source):
                return source, name
    for source in ("central", "federated", "train"):
        names = metric_names(cells, source)
        if names:
            better = [name for name in names if not name.endswith("loss")]
            return source, "accuracy" if "accuracy" in names else (better or names)[0]
    return "", ""


def lower_is_better(cells: Iterable[Cell], name: str) -> bool:
    """Say whether a metric's small values are the good ones: as the trainer says, else by the field's names."""
    return _declared(cells).get(name, "min" if units.lower_is_better(name) else "max") == "min"


def _declared(cells: Iterable[Cell]) -> dict[str, str]:
    """Return the metrics by which the cells' trainers want to be judged, with ``max`` or ``min``."""
    found = {}
    for cell in cells:
        metric = cell.summary.get("metric")
        if isinstance(metric, list) and len(metric) == 2 and metric[1] in ("max", "min"):
            found[str(metric[0])] = str(metric[1])
    return found


def value(row: Row, source: str, name: str) -> float | None:
    """Return one metric of one round, or None."""
    return reading.metrics(row, source).get(name)


def final(cell: Cell, source: str, name: str) -> float | None:
    """Return a cell's last value of a metric: the summary's, else the last round's that has one."""
    outcome = cell.summary.get("final")
    if isinstance(outcome, dict):
        found = reading.numbers(outcome.get(source)).get(name)
        if found is not None:
            return found
    return next((v for row in reversed(cell.rounds) if (v := value(row, source, name)) is not None), None)


def curve(cells: Iterable[Cell], pick: Callable[[Row], float | None]) -> list[tuple[int, Spread]]:
    """Return the spread over seeds of a quantity at every round where some cell has it."""
    by_round: dict[int, list[float]] = {}
    for cell in cells:
        for row in cell.rounds:
            picked = pick(row)
            if picked is not None:
                by_round.setdefault(int(row["round"]), []).append(picked)
    return [(index, each) for index in sorted(by_round) if (each := spread(by_round[index]))]


def against_bytes(cells: Sequence[Cell], source: str, name: str) -> list[tuple[float, Spread]]:
    """Return a metric's spread against the bytes sent so far, up and down, both over the seeds."""
    by_round: dict[int, list[tuple[float, float]]] = {}
    for cell in cells:
        total = 0.0
        for row in cell.rounds:
            total += bytes_of(row)
            picked = value(row, source, name)
            if picked is not None:
                by_round.setdefault(int(row["round"]), []).append((total, picked))
    result = []
    for index in sorted(by_round):
        sent = spread(total for total, _ in by_round[index])
        scores = spread(score for _, score in by_round[index])
        assert sent is not None
        assert scores is not None
        result.append((sent.mean, scores))
    return result


def bytes_of(row: Row) -> float:
    """Return the bytes of one round, up and down."""
    return (reading.finite(row.get("bytes_up")) or 0.0) + (reading.finite(row.get("bytes_down")) or 0.0)


def total(cells: Iterable[Cell], key: str) -> float:
    """Sum ``seconds``, ``bytes_up`` or ``bytes_down`` over cells: the summary's figure, else the rounds' sum."""
    result = 0.0
    for cell in cells:
        known = reading.finite(cell.summary.get(key))
        result += sum(reading.finite(row.get(key)) or 0.0 for row in cell.rounds) if known is None else known
    return result


def rounds_done(cell: Cell) -> int:
    """Return the number of the last round; 0 where only the start was evaluated, or nothing."""
    return max((int(row["round"]) for row in cell.rounds), default=0)


def phases(row: Row) -> dict[str, float]:
    """Return a round's seconds by phase, with what no phase accounts for as ``REST``; in the order of a round."""
    known = {name: max(s, 0.0) for name, s in reading.numbers(row.get("phases")).items() if np.isfinite(s)}
    ordered = {name: known[name] for name in PHASES if name in known} | known
    seconds = reading.finite(row.get("seconds"))
    return ordered | {REST: max((seconds or 0.0) - sum(known.values()), 0.0)}


def mean_phases(rows: Sequence[Row]) -> dict[str, float]:
    """Return mean seconds by phase over rounds; a phase that a round did not have counts as zero there."""
    sums: dict[str, float] = {}
    for row in rows:
        for name, seconds in phases(row).items():
            sums[name] = sums.get(name, 0.0) + seconds
    rest = sums.pop(REST, None)
    if rest is not None:
        sums[REST] = rest
    return {name: seconds / len(rows) for name, seconds in sums.items()}


def overhead(cell: Cell) -> Overhead | None:
    """Return a cell's overhead: the summary's, else from the probes in its rounds, else None."""
    known = reading.numbers(cell.summary.get("overhead"))
    if "ratio" in known:
        return Overhead(
            known["ratio"], known.get("low"), known.get("high"), known.get("cpu_ratio"), int(known.get("samples", 0))
        )
    probes = [probe for row in cell.rounds if "ratio" in (probe := reading.numbers(row.get("probe")))]
    if not probes:
        return None
    low, ratio, high = np.percentile([probe["ratio"] for probe in probes], [25, 50, 75])
    cpu = [probe["cpu_ratio"] for probe in probes if "cpu_ratio" in probe]
    return Overhead(float(ratio), float(low), float(high), float(np.median(cpu)) if cpu else None, len(probes))


def pooled_overhead(cells: Iterable[Cell]) -> Overhead | None:
    """Return the median of the cells' overheads, with the lowest and highest end of their ranges."""
    measured = [each for cell in cells if (each := overhead(cell)) is not None]
    if not measured:
        return None
    low = [each.low for each in measured if each.low is not None]
    high = [each.high for each in measured if each.high is not None]
    cpu = [each.cpu_ratio for each in measured if each.cpu_ratio is not None]
    return Overhead(
        ratio=float(np.median([each.ratio for each in measured])),
        low=min(low, default=None),
        high=max(high, default=None),
        cpu_ratio=float(np.median(cpu)) if cpu else None,
        samples=sum(each.samples for each in measured),
    )


def thin(points: Sequence[T], most: int = MAX_POINTS) -> list[T]:
    """Return at most ``most`` of the points, evenly spaced, first and last among them."""
    if len(points) <= most:
        return list(points)
    return [points[index] for index in np.linspace(0, len(points) - 1, most).round().astype(int)]
