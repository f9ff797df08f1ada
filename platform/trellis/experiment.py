"""Run all cells of a scenario: every variant under every seed, each on the grid its runtime names."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from trellis import scenario as scenario_file
from trellis.data.base import Federation
from trellis.data.loading import load_federation
from trellis.errors import PluginError, RunError, TrellisError
from trellis.grids.base import ClientGrid, StreamGrid
from trellis.runs import CellFolder, Run, write_json
from trellis.scenario import Runtime, Scenario

GridFor = Callable[[Scenario, int, CellFolder], tuple[StreamGrid, Any]]
"""Makes the grid for a scenario, its number of clients and its cell, with the sites of this process beside it."""

Grids = Callable[[ModuleType, Mapping[str, Any]], AbstractContextManager[GridFor]]
"""Offers grids for the cells of an experiment, given the client side's module and the cells by name."""

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
"""What the system says where the run's folder cannot be written to."""


@dataclass
class Hooks:
    """What a caller wants to hear of while an experiment runs. By default nothing."""

    on_cell: Callable[[CellFolder, Scenario], None] = lambda *_: None
    on_round: Callable[[CellFolder, dict[str, Any]], None] = lambda *_: None
    on_note: Callable[[str], None] = lambda _: None


@dataclass
class Outcome:
    """What became of an experiment: a summary for every cell that completed, an error for every other."""

    summaries: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, TrellisError] = field(default_factory=dict)


def app_module(side: str) -> ModuleType:
    """Return the module of the client or server side, found by its entry point in ``trellis.apps``.

    Raises:
        PluginError: that side is not installed here.
    """
    for entry in entry_points(group="trellis.apps", name=side):
        module: ModuleType = entry.load()
        return module
    raise PluginError(
        "app-missing", f"the {side} side of Trellis is not installed: pip install '.[train]' in a checkout"
    )


def execute(run: Run, hooks: Hooks | None = None, grids: Grids | None = None) -> Outcome:
    """Run every cell that is not complete yet. A failing cell does not stop the others.

    Clients are where ``grids`` says; by default where the scenario's runtime says.

    The run's ``status.json`` says at the end how it went; the folder is resumable at every moment.
    """
    hooks = hooks or Hooks()
    client, server = app_module("client"), app_module("server")
    outcome = Outcome()
    with run:
        run.status("running")
        try:
            todo, done = _deal(run, client)
            outcome.summaries.extend(done)
            with (grids or _grids)(client, {folder.name: cell for _, folder, cell in todo}) as grid_for:
                for each, folder, cell in todo:
                    hooks.on_cell(folder, each)
                    try:
                        outcome.summaries.append(
                            _run_cell(client, server, grid_for, each, folder, len(cell.parts), hooks)
                        )
                    except TrellisError as error:
                        outcome.failed[folder.name] = error
                        hooks.on_note(f"{folder.name}: {error}")
                    except OSError as error:
                        if error.errno not in DISK:
                            raise
                        where = folder.path if error.filename is None else error.filename
                        raise RunError(
                            "run-disk", f"{where}: {error.strerror}; the run can be resumed once this is mended"
                        ) from None
        except BaseException as error:
            reason = str(error) if isinstance(error, TrellisError) else f"{type(error).__name__}: {error}"
            with suppress(OSError):  # a full disk must not hide the error
                run.status("failed", " ".join(reason.split()))
            raise
        if outcome.failed:
            name, first = next(iter(outcome.failed.items()))
            run.status("failed", f"{name}: {first}")
        else:
            run.status("complete")
    return outcome


def _deal(run: Run, client: ModuleType) -> tuple[list[tuple[Scenario, CellFolder, Any]], list[dict[str, Any]]]:
    """Deal the data of every cell, so that a partition that cannot work is known before any cell starts."""
    import json

    todo, done = [], []
    for each, folder in run.cells():
        if folder.complete:
            done.append(json.loads((folder.path / "summary.json").read_text()))
            continue
        federation = load_federation(each, folder.seed)
        scenario_file.check_cohorts(each, federation.num_clients)
        _write_partition(folder, federation)
        cell = client.Cell(scenario_file.plain(each), folder.seed, federation.parts, federation.test_parts)
        todo.append((each, folder, cell))
    return todo, done


def _run_cell(
    client: ModuleType,
    server: ModuleType,
    grid_for: GridFor,
    each: Scenario,
    folder: CellFolder,
    num_clients: int,
    hooks: Hooks,
) -> dict[str, Any]:
    grid, sites = grid_for(each, num_clients, folder)
    with torch_threads(each.runtime.threads):
        evaluator = client.Evaluator(sites, folder.name)
        summary: dict[str, Any] = server.run_cell(
            each,
            folder,
            grid,
            num_clients,
            evaluator.initial,
            evaluator,
            lambda line: hooks.on_round(folder, line),
        )
    return summary


def _write_partition(folder: CellFolder, federation: Federation) -> None:
    if federation.data.kind == "none" or federation.num_clients > 10_000:
        return  # nothing that a picture could show
    has_labels = federation.data.num_classes > 0
    write_json(
        folder.path / "partition.json",
        {
            "classes": list(federation.data.classes),
            "counts": federation.label_counts().tolist() if has_labels else [],
            "train": [len(part) for part in federation.parts],
            "test": [len(part) for part in federation.test_parts],
        },
    )


@contextmanager
def _grids(client: ModuleType, cells: Mapping[str, Any]) -> Iterator[GridFor]:
    """Offer the grid for a cell; cells of the same runtime and size share one, so workers start once."""
    live: dict[tuple[Runtime, int], tuple[ClientGrid, Any]] = {}

    def grid_for(each: Scenario, num_clients: int, _: CellFolder) -> tuple[ClientGrid, Any]:
        key = (each.runtime, num_clients)
        if key not in live:
            for grid, _ in live.values():
                grid.close()
            live.clear()
            live[key] = _make_grid(client, cells, each.runtime, num_clients)
        live[key][0].forget()
        return live[key]

    try:
        yield grid_for
    finally:
        for grid, _ in live.values():
            grid.close()


def _make_grid(
    client: ModuleType, cells: Mapping[str, Any], runtime: Runtime, num_clients: int
) -> tuple[ClientGrid, Any]:
    sites = client.Sites(cells)
    if runtime.grid == "local":
        from trellis.grids.local import LocalGrid

        # Clients and the central evaluation share one live model.
        return LocalGrid(client.make_app(sites=sites), num_clients), sites
    from trellis.grids.ray import RayGrid

    grid = RayGrid(
        client.AppFactory(cells),
        num_clients,
        workers=runtime.workers,
        threads=runtime.threads,
        gpus_per_worker=runtime.gpus_per_worker,
        address=runtime.address,
        memory_per_worker_mb=runtime.memory_per_worker_mb,
    )
    return grid, sites


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch's threads for a while: sums over another number of threads differ in the last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
