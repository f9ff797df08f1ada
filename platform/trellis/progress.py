"""What a person sees while an experiment runs, and what a script reads."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from trellis.experiment import Hooks, Outcome
    from trellis.runs import CellFolder, Run
    from trellis.scenario import Scenario


class Quiet:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def hooks(self) -> Hooks:
        from trellis.experiment import Hooks

        return Hooks()


class JsonLines(Quiet):
    """One JSON object a line: every round as it stands in ``metrics.jsonl``, with its cell."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def hooks(self) -> Hooks:
        from trellis.experiment import Hooks

        def write(folder: CellFolder, line: dict[str, Any]) -> None:
            self.stream.write(json.dumps({"cell": folder.name, **line}) + "\n")
            self.stream.flush()

        return Hooks(on_round=write)


class Live(Quiet):
    """A progress bar a cell with round, accuracy, loss, bytes and time left; plain lines where there is no terminal."""

    def __init__(self, console: Console, run: Run) -> None:
        self.console = console
        self.run = run
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task: TaskID | None = None
        self.last_line = 0.0

    def __enter__(self) -> Self:
        self.console.print(f"[bold]{self.run.scenario.name}[/bold]  {self.run.path}")
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def hooks(self) -> Hooks:
        from trellis.experiment import Hooks

        return Hooks(on_cell=self._cell, on_round=self._round, on_note=self._note)

    def _cell(self, folder: CellFolder, each: Scenario) -> None:
        self.total = each.rounds.count
        if self.console.is_terminal:
            self.task = self.bars.add_task(folder.name, total=self.total, figures="starting workers")

    def _round(self, folder: CellFolder, line: dict[str, Any]) -> None:
        if self.task is not None:
            self.bars.update(self.task, completed=line["round"], figures=figures(line))
        elif line["round"] in (0, self.total) or time.monotonic() - self.last_line > 1.0:
            self.last_line = time.monotonic()
            self.console.print(f"{folder.name}  round {line['round']}/{self.total}  {figures(line)}")

    def _note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def summary(self, outcome: Outcome) -> None:
        """Print the final figures, one row a variant, mean and standard deviation over seeds."""
        from statistics import mean, stdev

        table = Table(
            "variant", "seeds", "accuracy", "clients' accuracy", "seconds", "overhead R", box=None, pad_edge=False
        )
        variants: dict[str, list[dict[str, Any]]] = {}
        for each in outcome.summaries:
            variants.setdefault(each["variant"], []).append(each)
        for name, cells in variants.items():
            row = [name, str(len(cells))]
            for where in ("central", "federated"):
                values = [c["final"][where]["accuracy"] for c in cells if "accuracy" in (c["final"][where] or {})]
                spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
                row.append(f"{mean(values):.3f}{spread}" if values else "-")
            row.append(f"{sum(c['seconds'] for c in cells):.1f}")
            ratios = [c["overhead"]["ratio"] for c in cells if c["overhead"]]
            row.append(f"{mean(ratios):.2f}" if ratios else "-")
            table.add_row(*row)
        if variants:
            self.console.print()
            self.console.print(table)


def figures(line: dict[str, Any]) -> str:
    """Return a round's figures as a person reads them."""
    parts = []
    shown = line.get("central") or line.get("federated") or {}
    if "accuracy" in shown:
        parts.append(f"accuracy {shown['accuracy']:.3f}")
    loss = shown.get("loss", (line.get("train") or {}).get("loss"))
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    parts.append(f"down {size(line['bytes_down'])}  up {size(line['bytes_up'])}")
    if line["failures"]:
        parts.append(f"[yellow]{len(line['failures'])} failed[/yellow]")
    return "  ".join(parts)


def size(num_bytes: float) -> str:
    """Return bytes with a decimal unit, e.g. ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
