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
        self.metric = "accuracy"
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
        self.metric = _metric(each)
        if self.console.is_terminal:
            self.task = self.bars.add_task(folder.name, total=self.total, figures="starting workers")

    def _round(self, folder: CellFolder, line: dict[str, Any]) -> None:
        if self.task is not None:
            self.bars.update(self.task, completed=line["round"], figures=figures(line, self.metric))
        elif line["round"] in (0, self.total) or time.monotonic() - self.last_line > 1.0:
            self.last_line = time.monotonic()
            self.console.print(f"{folder.name}  round {line['round']}/{self.total}  {figures(line, self.metric)}")

    def _note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def summary(self, outcome: Outcome) -> None:
        """Print the final figures, one row a variant, mean and standard deviation over seeds."""
        from statistics import mean, stdev

        variants: dict[str, list[dict[str, Any]]] = {}
        for each in outcome.summaries:
            variants.setdefault(each["variant"], []).append(each)
        columns = _columns(outcome.summaries)
        heads = [f"clients' {name}" if where == "federated" else name for where, name in columns]
        table = Table("variant", "seeds", *heads, "seconds", "overhead R", box=None, pad_edge=False)
        for name, cells in variants.items():
            row = [name, str(len(cells))]
            for where, metric in columns:
                values = [c["final"][where][metric] for c in cells if metric in (c["final"][where] or {})]
                digits = 0 if all(float(value).is_integer() and abs(value) > 1 for value in values) else 3
                spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
                row.append(f"{mean(values):.{digits}f}{spread}" if values else "-")
            row.append(f"{sum(c['seconds'] for c in cells):.1f}")
            ratios = [c["overhead"]["ratio"] for c in cells if c["overhead"]]
            row.append(f"{mean(ratios):.2f}" if ratios else "-")
            table.add_row(*row)
        if variants:
            self.console.print()
            self.console.print(table)


def _metric(each: Scenario) -> str:
    """Return the name of the metric that the scenario's trainer wants to be judged by."""
    from trellis import registry

    trainer = registry.load("trainers", each.trainer.name, base=each.folder)
    return str(getattr(trainer, "metric", ("accuracy", "max"))[0])


def _columns(summaries: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return where something was measured and what: the trainers' own metrics, else the loss."""
    columns = []
    for where in ("central", "federated"):
        found = [(each["final"][where] or {}, (each.get("metric") or ["accuracy"])[0]) for each in summaries]
        names = dict.fromkeys(name for metrics, name in found if name in metrics)
        columns += [(where, name) for name in names or (["loss"] if any("loss" in m for m, _ in found) else [])]
    return columns


def figures(line: dict[str, Any], metric: str = "accuracy") -> str:
    """Return a round's figures as a person reads them, the trainer's own metric first."""
    parts = []
    shown = line.get("central") or line.get("federated") or {}
    if metric in shown and metric != "loss":
        value = shown[metric]
        parts.append(f"{metric} {value:.0f}" if float(value).is_integer() and value > 1 else f"{metric} {value:.3f}")
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
