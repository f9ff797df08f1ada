"""Measure what Trellis costs beside the training itself: one command, one table.

    python benchmarks/overhead.py [--only NAME] [--quick]

Writes benchmarks/results/overhead.json and .csv. See README.md beside this file for what the rows mean.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before NumPy and torch: a benchmark that shares cores must not start more threads than it says.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import memory
import ratios
import rounds
from measuring import HERE, Row
from rich import box
from rich.console import Console
from rich.table import Table

from trellis.runs import environment

GROUPS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "ratio": ratios.rows,
    "empty-round": rounds.empty,
    "ray": rounds.ray,
    "dispatch": rounds.dispatch,
    "growth": rounds.growth,
    "memory": memory.rows,
}


def main() -> None:
    """Measure the groups that are asked for, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(GROUPS), help="measure only this; may be given again")
    parser.add_argument("--quick", action="store_true", help="few rounds: checks that it runs, not for figures")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for overhead.json and .csv")
    given = parser.parse_args()
    console = Console()
    console.width = max(console.width, 180)  # a line for each row, in a file too
    found: list[Row] = []
    for name in given.only or GROUPS:
        with console.status(f"measuring {name}"):
            found.extend(GROUPS[name](given.quick))
    console.print(table(found))
    write(found, given.out, quick=given.quick)
    console.print(f"written to {given.out}/overhead.json and overhead.csv")


def table(found: list[Row]) -> Table:
    """Return the rows for a terminal."""
    title = "Overhead: medians with quartiles; targets are judged by CPU time where it is given"
    result = Table(title=title, box=box.SIMPLE)
    for column in ("", "quantity", "median", "quartiles", "CPU", "target", "aim", "", "note"):
        result.add_column(column, overflow="fold")
    for each in found:
        verdict = {None: "", True: "met", False: "[red]missed"}[each.met]
        result.add_row(
            each.name,
            each.quantity,
            f"{_short(each.value)} {each.unit}",
            f"{_short(each.low)} to {_short(each.high)}",
            _short(each.cpu),
            _short(each.target),
            _short(each.aim),
            verdict,
            each.note,
        )
    return result


def write(found: list[Row], folder: Path, *, quick: bool) -> None:
    """Write the rows with what a reader needs to judge them: machine, versions, date, command."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [{**asdict(each), "met": each.met} for each in found]
    whole = {"environment": {**environment(), "cpu": _cpu(), "load": os.getloadavg()}, "quick": quick, "rows": lines}
    (folder / "overhead.json").write_text(json.dumps(whole, indent=1) + "\n")
    with (folder / "overhead.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _cpu() -> str:
    """Return the processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


if __name__ == "__main__":
    main()
