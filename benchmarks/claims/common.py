"""What the measurements of claims share: a claim with its outcome, runs side by side, a figure with its spread."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from trellis import experiment, flower, scenario
from trellis.runs import CellFolder, Run, read_lines
from trellis.scenario import Scenario

Verdict = Literal["held", "not held", "in part"]

MEASURED_ALIKE: dict[str, Any] = {
    "runtime": {"grid": "local"},
    "probe": {"every": 0, "least": 0},
    "checkpoint": {"every": 1000},
}
"""What a comparison changes in a scenario unless it says otherwise: nothing that could change an accuracy."""


@dataclass(frozen=True)
class Claim:
    """One relative claim of a paper and what became of it here.

    Attributes:
        text: the claim, at the scale at which it was tried.
        baseline: what it was compared with.
        measured: figures with their spread over seeds.
        held: the verdict, decided by code from the figures.
        finding: why, where it did not hold or needs a caveat; one or two sentences.
    """

    text: str
    baseline: str
    measured: str
    held: Verdict
    finding: str = ""


@dataclass(frozen=True)
class Cell:
    """One variant under one seed: its rounds, and what was taken from its folder before that went away."""

    variant: str
    seed: int
    lines: list[dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)

    def last(self, *keys: str) -> float:
        """Return a figure of the last round that has it, e.g. ``last("central", "accuracy")``.

        Raises:
            KeyError: no round has it.
        """
        for line in reversed(self.lines):
            value: Any = line
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                return float(value)
        raise KeyError(f"no round of {self.variant} seed {self.seed} has {'.'.join(keys)}")


def compare(
    base: Mapping[str, Any] | Path,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    overrides: Sequence[str] = (),
    also: Callable[[Scenario, CellFolder], dict[str, Any]] | None = None,
) -> dict[str, list[Cell]]:
    """Run variants of a scenario under the same seeds and return their cells, by variant, in the order of the seeds.

    Args:
        base: a scenario as a mapping, or its file. Runs on one process, without probe, with one checkpoint at the end.
        variants: changes by name, as under ``variants:`` of a file; None keeps the file's own.
        seeds: for every variant alike.
        overrides: further ``key=value`` changes, as on the command line; for files only.
        also: called with each finished cell while its folder exists; what it returns becomes ``Cell.extra``.

    Raises:
        TrellisError: a run failed.
    """
    flower.quiet()
    raw = scenario.plain(scenario.load(base, list(overrides))) if isinstance(base, Path) else dict(base)
    alike = {key: {**value, **raw.get(key, {})} for key, value in MEASURED_ALIKE.items()}
    if isinstance(base, Path):
        alike = {key: {**raw.get(key, {}), **value} for key, value in MEASURED_ALIKE.items()}
    changed = {"name": "claims", **raw, **alike, "seeds": list(seeds)}
    if variants is not None:
        changed["variants"] = {name: dict(changes) for name, changes in variants.items()}
    whole = scenario.from_mapping(changed)
    scenario.check(whole)
    with tempfile.TemporaryDirectory(prefix="trellis-claims-") as folder:
        run = Run.create(Path(folder), whole)
        outcome = experiment.execute(run)
        for error in outcome.failed.values():
            raise error
        cells: dict[str, list[Cell]] = {}
        for each, place in run.cells():
            extra = also(each, place) if also else {}
            lines = read_lines(place.path / "metrics.jsonl")
            cells.setdefault(place.variant, []).append(Cell(place.variant, place.seed, lines, extra))
    return cells


def spread(values: Sequence[float], digits: int = 1, unit: str = "", sign: bool = False) -> str:
    """Return ``mean ± standard deviation`` over seeds, e.g. ``+4.9 ± 2.0 points``."""
    plus = "+" if sign else ""
    text = f"{mean(values):{plus}.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text + (f" {unit}" if unit else "")


def paired(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Return ``a - b`` seed by seed."""
    return [x - y for x, y in zip(a, b, strict=True)]
