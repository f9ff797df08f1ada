"""The page a person looks at when a run has ended: one HTML file that holds all it shows.

``build`` writes it into the run's folder, whatever state the folder is in; ``compare`` sets several runs
side by side, and ``comparison_table`` gives the same as rows for a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["FILE", "build", "compare", "comparison_table"]

FILE = "report.html"


def build(run: Path) -> Path:
    """Write ``report.html`` into a run's folder and return its path.

    The same folder gives the same bytes. Missing or damaged files within it are said on the page.

    Raises:
        RunError: there is no such folder, or it is not a run's.
    """
    from trellis.report import page, reading, rendering

    return rendering.write(run / FILE, "page.html.j2", page.context(reading.read(run)))


def compare(runs: Sequence[Path], target: Path) -> Path:
    """Write a page that sets runs side by side to ``target`` and return it.

    Raises:
        RunError: no run is given, or one of them is no run's folder.
    """
    from trellis.report import comparison, rendering

    return rendering.write(target, "compare.html.j2", comparison.context(comparison.read(runs)))


def comparison_table(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return one row per run and variant: final metrics, and the scenario's keys that differ between rows.

    Keys of a row: ``run``, ``variant``, ``state``, ``seeds`` and ``rounds`` (numbers), ``metrics`` (by
    ``"central accuracy"`` and so on, each ``{"mean", "sd", "count"}`` with ``sd`` None for one seed),
    ``seconds``, ``bytes_up``, ``bytes_down`` (sums over seeds), ``differences`` (dotted key to value, only
    of keys that are not the same in all rows).

    Raises:
        RunError: no run is given, or one of them is no run's folder.
    """
    from trellis.report import comparison

    return comparison.table(comparison.read(runs))
