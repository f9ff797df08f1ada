"""Several runs side by side: every variant of every run is one series."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trellis import scenario as scenarios
from trellis.errors import RunError, ScenarioError
from trellis.report import clients, figures, page, reading, units
from trellis.report.figures import Series
from trellis.report.reading import Run

IGNORED = frozenset({"description", "base", "seeds", "variants"})
"""Keys of a scenario that name or group runs, and say nothing of one series."""

ABSENT = None
"""In place of a key's value where a scenario does not have the key."""

Entry = tuple[Run, str, Series]
"""A run, one of its variants, and the series of that variant's cells under a label of its own."""


def read(folders: Sequence[Path]) -> list[Entry]:
    """Read runs and name their series so that no two are called alike.

    Raises:
        RunError: no run is given, or one of them is no run's folder.
    """
    if not folders:
        raise RunError("run-missing", "nothing to compare: give at least one run's folder")
    runs = [reading.read(folder) for folder in folders]
    entries = []
    for run, label in zip(runs, labels(runs), strict=True):
        series = figures.series_of(run, label) or [Series(label, ())]
        entries += [(run, variant, each) for variant, each in zip(run.variants or [""], series, strict=True)]
    return entries


def labels(runs: Sequence[Run]) -> list[str]:
    """Return a name per run: the scenario's where that is enough, else with the folder's, else numbered too."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.name} {run.folder.resolve().name}" for run in runs]
    twice, seen = {name for name, count in Counter(names).items() if count > 1}, Counter[str]()
    result = []
    for name in names:
        seen[name] += 1
        result.append(f"{name} #{seen[name]}" if name in twice else name)
    return result


def table(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return one row per series. See ``trellis.report.comparison_table``."""
    differing = differences([settings(run, variant) for run, variant, _ in entries])
    rows = []
    for (run, variant, series), changed in zip(entries, differing, strict=True):
        metrics = {}
        for source in ("central", "federated"):
            for name in figures.metric_names(series.cells, source):
                spread = figures.spread(figures.final(cell, source, name) for cell in series.cells)
                if spread:
                    metrics[f"{source} {name}"] = {"mean": spread.mean, "sd": spread.sd, "count": spread.count}
        rows.append(
            {
                "run": run.folder.resolve().name,
                "variant": variant,
                "label": series.label,
                "state": run.state,
                "seeds": len(series.cells),
                "rounds": max(map(figures.rounds_done, series.cells), default=0),
                "metrics": metrics,
                "seconds": figures.total(series.cells, "seconds"),
                "bytes_up": figures.total(series.cells, "bytes_up"),
                "bytes_down": figures.total(series.cells, "bytes_down"),
                "differences": changed,
            }
        )
    return rows


def settings(run: Run, variant: str) -> dict[str, object]:
    """Return one variant's scenario as dotted keys; of a scenario that no longer reads, the raw file's."""
    raw: Mapping[str, Any] = run.scenario
    try:
        raw = scenarios.plain(dict(scenarios.expand(scenarios.from_mapping(raw)))[variant])
    except (ScenarioError, KeyError):
        changes = reading.at(raw, "variants", variant)
        raw = {**raw, **(changes if isinstance(changes, Mapping) else {})}
    return page.flat({key: value for key, value in raw.items() if key not in IGNORED})


def differences(scenarios_: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Return of each scenario only the keys whose values are not the same in all."""
    keys = dict.fromkeys(key for each in scenarios_ for key in each)
    differing = [key for key in keys if any(each.get(key) != scenarios_[0].get(key) for each in scenarios_)]
    return [{key: each.get(key, ABSENT) for key in differing} for each in scenarios_]


def context(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return all that ``compare.html.j2`` shows."""
    runs = list({id(run): run for run, _, _ in entries}.values())
    series = [each for _, _, each in entries]
    cells = [cell for each in series for cell in each.cells]
    source, name = figures.main_metric(cells)
    rows = table(entries)
    return {
        "title": " · ".join(dict.fromkeys(run.name for run in runs)),
        "runs": [
            (label, run, page.when(str(run.environment.get("started") or run.finished)))
            for label, run in zip(labels(runs), runs, strict=True)
        ],
        "problems": [
            f"{label}: {line}" for label, run in zip(labels(runs), runs, strict=True) for line in run.problems
        ],
        "series": page.legend(series),
        "headline": page.headline(series, source, name),
        "learning": page.learning(series, source, name),
        "clients": clients.clients(series, name),
        "results": page.results(series, name),
        "keys": list(rows[0]["differences"]),
        "differences": [[_setting(value) for value in row["differences"].values()] for row in rows],
    }


def _setting(value: object) -> str:
    return units.NONE if value is None else str(value).lower() if isinstance(value, bool) else str(value)
