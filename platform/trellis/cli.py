"""The command line. Every command checks its input first and says in one line what is wrong.

Heavy libraries are imported inside the commands: ``trellis --help`` must answer at once.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from trellis.deploy import commands
from trellis.errors import PluginError, TrellisError, listed, nearest

app = typer.Typer(
    name="trellis",
    help="Federated and edge-cloud learning from one scenario file, simulated or deployed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
new_app = typer.Typer(help="Write a working start for something of your own.", no_args_is_help=True)
app.add_typer(new_app, name="new")

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Root = Annotated[Path, typer.Option("--runs", help="folder of all runs", envvar="TRELLIS_RUNS")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="override, e.g. --set trainer.lr=0.1", metavar="KEY=VALUE")
]
File = Annotated[Path, typer.Argument(help="scenario file", show_default=False)]
RUNS = Path("runs")


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="show the full traceback of an error")] = False,
) -> None:
    global _traceback
    _traceback = traceback


_traceback = False


@app.command()
def run(
    file: Annotated[Path | None, typer.Argument(help="scenario file", show_default=False)] = None,
    set_: Set = None,
    resume: Annotated[str | None, typer.Option(help="continue a run: its folder, name/time, or 'latest'")] = None,
    runs: Root = RUNS,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print only where the report is")] = False,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object a line")] = False,
) -> None:
    """Run a scenario, all its variants and seeds, and write a report."""
    from trellis import scenario
    from trellis.runs import Run, resolve

    if (file is None) == (resume is None):
        raise TrellisError("usage", "give either a scenario file or --resume RUN")
    if file is not None:
        loaded = scenario.load(file, set_ or [])
        current = Run.create(runs, loaded)
    else:
        assert resume is not None
        if set_:
            raise TrellisError("usage", "--set cannot be used with --resume: a resumed run is the run it was")
        current = Run.open(resolve(resume, runs))
        if current.deployed:
            raise TrellisError(
                "run-deployed",
                f"{current.path} was run by nodes, which keep their private state; continue it with:"
                f" trellis serve --resume {current.path}",
            )
        scenario.check(current.scenario)
    raise typer.Exit(execute(current, quiet, json_))


def execute(
    current: Any,
    quiet: bool,
    as_json: bool,
    grids: Any = None,
    on_round: Callable[[str, dict[str, Any]], None] = lambda *_: None,
    command: str = "run",
) -> int:
    """Run an experiment with what a person wants to see of it; return the exit status.

    Args:
        current: the run.
        quiet, as_json: as of the command ``run``.
        grids: where clients are, see ``experiment.execute``.
        on_round: also called with a cell's name and the line of each of its rounds.
        command: that continues it.
    """
    from trellis import experiment, flower, report
    from trellis.progress import JsonLines, Live, Quiet

    flower.quiet()
    show: Any = JsonLines(sys.stdout) if as_json else Quiet() if quiet else Live(out, current)
    hooks = show.hooks()
    shown = hooks.on_round

    def told(folder: Any, line: dict[str, Any]) -> None:
        shown(folder, line)
        on_round(folder.name, line)

    hooks.on_round = told
    try:
        with show:
            outcome = experiment.execute(current, hooks, grids)
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk must not hide why it ended
            report.build(current.path)
        raise
    page = report.build(current.path)
    if as_json:
        sys.stdout.write(
            json.dumps({"run": str(current.path), "report": str(page), "failed": len(outcome.failed)}) + "\n"
        )
    elif quiet:
        out.print(str(page), markup=False)
    else:
        show.summary(outcome)
        out.print(f"\nReport: [bold]{page}[/bold]")
    for name, failure in outcome.failed.items():
        err.print(f"{name}: {failure}", markup=False)
    if outcome.failed and not quiet and not as_json:
        err.print(f"Continue with: trellis {command} --resume {current.path}", markup=False)
    return 1 if outcome.failed else 0


@app.command()
def validate(file: File, set_: Set = None) -> None:
    """Check a scenario file: keys, types, names, parameters, and that the parts fit one another."""
    from trellis import scenario

    loaded = scenario.load(file, set_ or [])
    cells = len(scenario.expand(loaded)) * len(loaded.seeds)
    out.print(f"{file}: valid. {cells} cell{'s' * (cells != 1)} of {loaded.rounds.count} rounds.", markup=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of scenario files, for editors."""
    from trellis import scenario

    sys.stdout.write(json.dumps(scenario.schema(), indent=2) + "\n")


@app.command()
def doctor(file: File, set_: Set = None) -> None:
    """Does this scenario fit this machine? Checks before the first round; exit status 1 if not."""
    from trellis import scenario
    from trellis.doctor import examine

    findings = examine(scenario.load(file, set_ or []))
    marks = {"ok": "[green]ok[/green]  ", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]"}
    for finding in findings:
        out.print(f"{marks[finding.level]}  {finding.subject:<12} {finding.text}")
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)


@app.command("runs")
def runs_(runs: Root = RUNS) -> None:
    """List the runs there are."""
    from trellis import scenario
    from trellis.runs import find, read_lines, read_status

    table = Table("run", "state", "cells", "rounds", "accuracy", box=None, pad_edge=False)
    for path in find(runs):
        status = read_status(path)
        cells = sorted(path.glob("cells/*"))
        lines = [read_lines(cell / "metrics.jsonl") for cell in cells]
        last = [line[-1] for line in lines if line]
        central = [
            entry["central"]["accuracy"] for entry in last if (entry.get("central") or {}).get("accuracy") is not None
        ]
        planned = scenario.read(path / "scenario.yaml").rounds.count
        table.add_row(
            f"{path.parent.name}/{path.name}",
            status["state"],
            f"{sum((cell / 'summary.json').is_file() for cell in cells)}/{len(cells)}",
            f"{min((entry['round'] for entry in last), default=0)}/{planned}",
            f"{sum(central) / len(central):.3f}" if central else "-",
        )
    if table.row_count:
        out.print(table)
    else:
        out.print(f"No runs under {runs}. Start one: trellis run scenarios/quickstart.yaml", markup=False)


@app.command()
def report(name: Annotated[str, typer.Argument(metavar="RUN")] = "latest", runs: Root = RUNS) -> None:
    """Rebuild a run's report page."""
    from trellis import report as pages
    from trellis.runs import resolve

    out.print(str(pages.build(resolve(name, runs))), markup=False)


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN RUN...")],
    runs: Root = RUNS,
    page: Annotated[Path, typer.Option(help="where to write the page")] = Path("compare.html"),
) -> None:
    """Put runs side by side, in the terminal and as a page."""
    from trellis import report as pages
    from trellis.runs import resolve

    if len(names) < 2:
        raise TrellisError("usage", "name at least two runs to compare")
    folders = [resolve(name, runs) for name in names]
    rows = pages.comparison_table(folders)
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    table = Table("run", "state", "seeds", "rounds", *metrics, "seconds", "differs in", box=None, pad_edge=False)
    for row in rows:
        cells = [row["metrics"].get(name) for name in metrics]
        shown = [
            f"{c['mean']:.3f}" + (f" ± {c['sd']:.3f}" if c.get("sd") is not None else "") if c else "-" for c in cells
        ]
        differs = ", ".join(f"{key}={value}" for key, value in row["differences"].items())
        table.add_row(
            row["label"], row["state"], str(row["seeds"]), str(row["rounds"]), *shown, f"{row['seconds']:.1f}", differs
        )
    out.print(table)
    out.print(str(pages.compare(folders, page)), markup=False)


@app.command("list")
def list_(group: Annotated[str, typer.Argument(help="trainers, strategies, datasets, partitioners or models")]) -> None:
    """List the plug-ins of a kind: bundled ones and those of installed packages."""
    from trellis import describe

    out.print(describe.plugins(_group(group)))


@app.command()
def info(group: str, name: str) -> None:
    """Show a plug-in: what it is, its parameters with defaults, and how a scenario names it."""
    from trellis import describe, registry
    from trellis.scenario import COMPONENTS

    group = _group(group)
    cls = registry.load(group, name)
    about = registry.info_of(cls)
    out.print(f"[bold]{about.name}[/bold]  {about.summary}")
    if about.paper:
        out.print(f"Paper: {about.paper}", markup=False)
    for line in describe.facts(about):
        out.print(line, markup=False)
    config = cls.Config  # type: ignore[attr-defined]
    if parameters := describe.parameters(config):
        out.print()
        out.print(describe.parameter_table(parameters))
    if group == "trainers":
        from trellis import examples

        text, path = examples.of_trainer(name)
        out.print(f"\nA scenario that runs it{f', {path.name}' if path else ''}:\n", markup=False)
        out.print(text.rstrip(), markup=False)
        return
    out.print(f"\n{COMPONENTS[group]}:\n  name: {about.name}", markup=False)
    example = [each for each in parameters if each.default != "null" and "." not in each.key]
    for each in sorted(example, key=lambda each: each.default != describe.REQUIRED)[:4]:
        value = "..." if each.default == describe.REQUIRED else each.default
        out.print(f"  {each.key}: {value}", markup=False)


@app.command()
def export(
    name: Annotated[str, typer.Argument(metavar="RUN", help="folder, name/time, name, or 'latest'")],
    to: Annotated[Path, typer.Option(help="file to write, e.g. model.onnx", show_default=False)],
    quantize: Annotated[str, typer.Option(help="int8 or none")] = "int8",
    variant: Annotated[str | None, typer.Option(help="which variant of the run, if it has several")] = None,
    seed: Annotated[int | None, typer.Option(help="which seed of the run, if it has several")] = None,
    max_drop: Annotated[
        float | None, typer.Option(metavar="POINTS", help="write nothing if accuracy falls by more percentage points")
    ] = None,
    calibration: Annotated[int, typer.Option(help="training examples that int8 ranges are measured on")] = 256,
    json_: Annotated[bool, typer.Option("--json", help="print the report as one JSON object")] = False,
    runs: Root = RUNS,
) -> None:
    """Write a finished run's model as an ONNX file for the edge."""
    from trellis.experiment import app_module
    from trellis.runs import resolve

    report = app_module("export").export_run(
        resolve(name, runs),
        to,
        precision=quantize,
        variant=variant,
        seed=seed,
        max_drop=max_drop,
        calibration=calibration,
    )
    if json_:
        sys.stdout.write(json.dumps(report.as_dict()) + "\n")
    else:
        for line in report.lines():
            out.print(line, markup=False)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def edge(context: typer.Context) -> None:
    """Run a model on a device, without torch: `trellis edge serve MODEL.onnx`."""
    from importlib.metadata import entry_points

    for entry in entry_points(group="trellis.apps", name="edge"):
        raise typer.Exit(entry.load().main(context.args))
    raise PluginError(
        "app-missing", "no installed package runs models on a device: pip install '.[edge]' in a checkout"
    )


@new_app.command("trainer")
def new_trainer(
    name: Annotated[str, typer.Argument(help="e.g. my-method")],
    folder: Annotated[Path, typer.Option(help="where to write it")] = Path(),
) -> None:
    """Write a trainer that works, a scenario that runs it, and its test."""
    from trellis.templates import write_trainer

    for path in write_trainer(name, folder):
        out.print(str(path), markup=False)


def _group(text: str) -> str:
    from trellis.registry import GROUPS

    for group in GROUPS:
        if text in (group, group.removesuffix("s"), {"strategies": "strategy"}.get(group)):
            return group
    raise TrellisError(
        "plugin-group", f"no kind of plug-in is named {text!r}.{nearest(text, GROUPS)} Known: {listed(GROUPS)}"
    )


commands.register(app)


def main() -> NoReturn:
    """Run the command line; an error a user can mend is one line, not a traceback."""
    try:
        app(standalone_mode=True)
    except TrellisError as error:
        if _traceback:
            raise
        err.print(f"error: {error}", markup=False)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        command = "serve" if "serve" in sys.argv[1:] else "run"
        err.print(f"interrupted; continue with: trellis {command} --resume latest", markup=False)
        sys.exit(130)
    sys.exit(0)


__all__ = ["app", "main"]
