"""Read a run's folder as it is: finished, failed half-way, or still being written.

Nothing here raises over a missing or damaged file within the folder. What could not be read is left out
and said in ``problems``, and the page prints those.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trellis import safe_yaml
from trellis.errors import RunError, ScenarioError

Row = Mapping[str, Any]
MAIN = "main"
COUNTS = frozenset({"num-examples"})
"""Keys beside the metrics of a reply that say how much was measured, not how well."""


@dataclass(frozen=True)
class Partition:
    """Examples per client and class, shape ``(clients, classes)``. ``classes`` is empty where there are none."""

    classes: tuple[str, ...]
    counts: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Examples per client."""
        sizes: NDArray[np.int64] = self.counts.sum(axis=1)
        return sizes


@dataclass(frozen=True)
class Failure:
    """One reply that was missing, an error, or refused by the screen."""

    round: int
    phase: str
    client: str
    reason: str


@dataclass(frozen=True)
class Cell:
    """One variant with one seed.

    Attributes:
        variant: the variant's name; empty where the scenario has none.
        rounds: the lines of ``metrics.jsonl`` by round, ascending. A round written twice (the run was
            resumed) counts once, as last written.
        evaluated: metrics by client of the last federated evaluation, and ``evaluated_round`` its round.
        summary: ``summary.json``, empty where the cell did not finish.
    """

    folder: str
    variant: str
    seed: int | None
    rounds: tuple[Row, ...]
    evaluated: Mapping[str, Mapping[str, float]]
    evaluated_round: int | None
    failures: tuple[Failure, ...]
    partition: Partition | None
    summary: Row


@dataclass(frozen=True)
class Run:
    """A run's folder, read. ``scenario`` is plain data; ``yaml`` is its text as it stands in the file."""

    folder: Path
    scenario: Row
    yaml: str
    environment: Row
    state: str
    error: str
    finished: str
    cells: tuple[Cell, ...]
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.scenario.get("name") or self.folder.resolve().parent.name)

    @property
    def variants(self) -> list[str]:
        """Names of the variants in the scenario's order, then any other that has a cell."""
        named = self.scenario.get("variants")
        order = [str(name) for name in named] if isinstance(named, Mapping) else []
        found = dict.fromkeys(cell.variant for cell in self.cells)
        return [name for name in order if name in found] + [name for name in found if name not in order]


@dataclass
class _Notes:
    """Collects what could not be read, by the file's name within the run's folder."""

    root: Path
    lines: list[str] = field(default_factory=list)

    def add(self, path: Path, text: str) -> None:
        self.lines.append(f"{path.relative_to(self.root)}: {text}")


def read(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        RunError: there is no such folder, or it is not a run's.
    """
    if not folder.is_dir():
        raise RunError("run-missing", f"no run's folder at {folder}")
    if not any((folder / name).exists() for name in ("scenario.yaml", "status.json", "cells")):
        raise RunError(
            "run-missing", f"{folder} is not a run's folder: it has none of scenario.yaml, status.json and cells"
        )
    notes = _Notes(folder)
    text, scenario = _scenario(folder / "scenario.yaml", notes)
    status = _object(folder / "status.json", notes)
    paths = (path for path in (folder / "cells").glob("*") if path.is_dir())
    cells = [_cell(path, notes) for path in paths]
    # Seeds as numbers: "main-seed10" comes after "main-seed2".
    cells.sort(key=lambda cell: (cell.variant, -1 if cell.seed is None else cell.seed, cell.folder))
    return Run(
        folder=folder,
        scenario=scenario,
        yaml=text,
        environment=_object(folder / "environment.json", notes),
        state=_text(status.get("state")) or "unknown",
        error=_text(status.get("error")),
        finished=_text(status.get("finished")),
        cells=tuple(cells),
        problems=tuple(sorted(notes.lines)),
    )


def finite(value: object) -> float | None:
    """Return a JSON number as a float, or None for anything else, NaN and infinity included."""
    result = number(value)
    return result if result is not None and math.isfinite(result) else None


def number(value: object) -> float | None:
    """Return a JSON number as a float (NaN and infinity too), or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def numbers(value: object) -> dict[str, float]:
    """Return the numbers of a JSON object by name; an empty dict for anything else."""
    if not isinstance(value, Mapping):
        return {}
    found = {str(name): number(each) for name, each in value.items()}
    return {name: each for name, each in found.items() if each is not None}


def metrics(row: Row, source: str) -> dict[str, float]:
    """Return the metrics of one round: ``source`` is "central", "federated" or "train"."""
    return {name: value for name, value in numbers(row.get(source)).items() if name not in COUNTS}


def at(data: Row, *keys: str) -> object:
    """Return what nested mappings hold under the keys, or None."""
    place: object = data
    for key in keys:
        place = place.get(key) if isinstance(place, Mapping) else None
    return place


def after_start(cell: Cell) -> Cell:
    """Return the cell without round 0, which only evaluates."""
    return replace(cell, rounds=tuple(row for row in cell.rounds if row["round"] > 0))


def _cell(path: Path, notes: _Notes) -> Cell:
    variant, _, tail = path.name.rpartition("-seed")
    rows: dict[int, Row] = {}
    for row in _lines(path / "metrics.jsonl", notes):
        index = finite(row.get("round"))
        if index is not None:
            rows[int(index)] = row
    rounds = tuple(rows[index] for index in sorted(rows))
    # Both files name failures: clients.jsonl those that replied, metrics.jsonl also the silent ones.
    failures: dict[tuple[int, str, str], str] = {}
    for row in rounds:
        listed = row.get("failures")
        for failure in listed if isinstance(listed, list) else ():
            if isinstance(failure, Mapping):
                _fail(failures, {**failure, "round": row["round"]})
    evaluated, evaluated_round = _clients(_lines(path / "clients.jsonl", notes), failures)
    summary_path = path / "summary.json"
    return Cell(
        folder=path.name,
        variant="" if variant in ("", MAIN) else variant,
        seed=int(tail) if variant and tail.isdecimal() else None,
        rounds=rounds,
        evaluated=evaluated,
        evaluated_round=evaluated_round,
        failures=tuple(Failure(*key, reason) for key, reason in failures.items()),
        partition=_partition(path / "partition.json", notes),
        summary=_object(summary_path, notes) if summary_path.exists() else {},
    )


def _clients(
    rows: Iterable[Row], failures: dict[tuple[int, str, str], str]
) -> tuple[dict[str, dict[str, float]], int | None]:
    """Walk once through the replies; keep the last evaluation and all failures, nothing else."""
    evaluated: dict[str, dict[str, float]] = {}
    last: int | None = None
    for row in rows:
        index = finite(row.get("round"))
        if index is None:
            continue
        if row.get("ok") is False:
            _fail(failures, row)
        elif row.get("phase") == "evaluate" and (last is None or index >= last):
            if index != last:
                evaluated, last = {}, int(index)
            evaluated[_text(row.get("client"))] = numbers(row.get("metrics"))
    return evaluated, last


def _fail(failures: dict[tuple[int, str, str], str], row: Row) -> None:
    key = (int(finite(row.get("round")) or 0), _text(row.get("phase")), _text(row.get("client")))
    failures.setdefault(key, _text(row.get("reason")) or "no reason given")


def _partition(path: Path, notes: _Notes) -> Partition | None:
    data = _object(path, notes)
    if not data:
        return None
    try:
        counts = np.asarray(data["counts"], dtype=np.int64)
        classes = tuple(map(str, data.get("classes") or ()))
        if counts.ndim != 2 or not counts.size or (counts < 0).any():
            raise ValueError(f"counts have the shape {counts.shape}")
        if classes and len(classes) != counts.shape[1]:
            raise ValueError(f"{len(classes)} classes, but {counts.shape[1]} counts per client")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        notes.add(path, f"not readable as a partition: {error}")
        return None
    return Partition(classes, counts)


def _scenario(path: Path, notes: _Notes) -> tuple[str, Row]:
    try:
        text = path.read_text(encoding="utf-8")
        data = safe_yaml.parse(text, path.name)
    except (OSError, UnicodeDecodeError) as error:
        notes.add(path, _why(error))
        return "", {}
    except ScenarioError as error:
        notes.add(path, error.message)
        return text, {}
    return text, data if isinstance(data, Mapping) else {}


def _object(path: Path, notes: _Notes) -> Row:
    """Read a file that holds one JSON object; an empty one where that fails."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.add(path, _why(error))
        return {}
    if not isinstance(data, Mapping):
        notes.add(path, "holds no JSON object")
        return {}
    return data


def _lines(path: Path, notes: _Notes) -> Iterator[Row]:
    """Yield the objects of a JSON-lines file. A crash leaves half a line at the end; it is skipped and noted."""
    skipped: list[int] = []
    count = 0
    try:
        with path.open("rb") as file:
            for count, line in enumerate(file, 1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, Mapping):
                    if row:
                        yield row
                else:
                    skipped.append(count)
    except OSError as error:
        notes.add(path, _why(error))
    if skipped == [count]:
        notes.add(path, "the last line is cut short; it is left out")
    elif skipped:
        notes.add(path, f"{len(skipped)} of {count} lines are not readable, the first is line {skipped[0]}")


def _why(error: Exception) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"not readable ({type(error).__name__})"


def _text(value: object) -> str:
    return "" if value is None else str(value)
