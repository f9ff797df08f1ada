"""The cloud side as a plain Flower ``ServerApp``, for ``flwr run`` and a SuperLink.

The run config names the scenario (see ``trellis.flower_app``) and the folder for runs (``runs``). Clients are
Flower's nodes; which partition each holds is Flower's to say.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from trellis import experiment, flower_app, report
from trellis.errors import GridError
from trellis.grids.base import StreamGrid
from trellis.grids.foreign import ForeignGrid, Numbered
from trellis.runs import CellFolder, Run
from trellis.scenario import Scenario

app = ServerApp()

NODES_TIMEOUT_S = 120.0

log = logging.getLogger("flwr")  # what `flwr run --stream` and `flwr log` show


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one variant of the scenario under one seed over Flower's nodes.

    Raises:
        TrellisError: the run failed; its folder says so too.
    """
    scenario = flower_app.read(context.run_config)
    run = Run.create(Path(str(context.run_config.get("runs", "runs"))).expanduser(), scenario)
    log.info("Trellis writes this run to %s", run.path.resolve())
    outcome = experiment.execute(run, experiment.Hooks(on_round=_tell), _over(grid))
    report.build(run.path)
    for error in outcome.failed.values():
        raise error


def _over(grid: Grid) -> experiment.Grids:
    """Return what offers Flower's nodes as the grid of an experiment."""

    @contextmanager
    def grids(client: ModuleType, cells: Mapping[str, Any]) -> Iterator[experiment.GridFor]:
        def grid_for(_: Scenario, num_clients: int, __: CellFolder) -> tuple[StreamGrid, Any]:
            nodes = Numbered(ForeignGrid(grid), num_clients)
            _await_nodes(nodes)
            return nodes, client.Sites(cells)

        yield grid_for

    return grids


def _await_nodes(nodes: Numbered) -> None:
    """Wait until there is a node for every client; Flower's own sampling would wait for ever.

    Raises:
        GridError: a node cannot be a client of this federation, or some client has no node in time.
    """
    end = time.monotonic() + NODES_TIMEOUT_S
    while (found := len(nodes.call_roll())) < nodes.num_clients or nodes.left_out:
        for node, reason in nodes.left_out.items():
            raise GridError("node-partition", f"node {node}: {reason} (Flower's num-supernodes, or the node's config)")
        if time.monotonic() > end:
            raise GridError(
                "nodes-missing",
                f"{found} of {nodes.num_clients} nodes connected within {NODES_TIMEOUT_S:g} s; scenario.clients",
            )
        time.sleep(0.2)


def _tell(_: CellFolder, line: dict[str, Any]) -> None:
    parts = [
        f"{group} {name} {value:.4f}"
        for group in ("train", "central", "federated")
        for name, value in (line[group] or {}).items()
        if isinstance(value, float)
    ]
    log.info("[round %d] %s (%.2f s)", line["round"], ", ".join(parts), line["seconds"])
