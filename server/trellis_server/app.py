"""The cloud side as a plain Flower ``ServerApp``, for ``flwr run`` and a SuperLink.

The run config names the scenario (``scenario``, a path), and optionally ``seed`` and ``runs``. Clients are
Flower's nodes: their number and the data each holds come from Flower's own set-up, sampling from the
scenario's strategy.
"""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from trellis import report, scenario
from trellis.errors import GridError, ScenarioError
from trellis.experiment import app_module
from trellis.grids.foreign import ForeignGrid
from trellis.runs import Run
from trellis.scenario import Scenario
from trellis_server.run import run_cell

app = ServerApp()

NODES_TIMEOUT_S = 120.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the first variant of the scenario under one seed over Flower's nodes."""
    text = str(context.run_config.get("scenario", ""))
    if not text:
        raise ScenarioError("scenario-missing", "the Flower run config has no key 'scenario' with the path of a file")
    loaded = scenario.load(Path(text))
    seed = int(context.run_config.get("seed", loaded.seeds[0]))
    _, each = scenario.expand(loaded)[0]
    each = each.model_copy(update={"seeds": (seed,), "variants": {}})
    with Run.create(Path(str(context.run_config.get("runs", "runs"))), each) as run:
        try:
            _run(grid, run, each, seed)
        except BaseException as error:
            run.status("failed", " ".join(str(error).split()))
            raise
        run.status("complete")
    report.build(run.path)


def _run(grid: Grid, run: Run, each: Scenario, seed: int) -> None:
    client = app_module("client")
    ((_, folder),) = run.cells()
    sites = client.Sites({folder.name: client.Cell(scenario.plain(each), seed)})
    evaluator = client.Evaluator(sites, folder.name)
    federation = evaluator.site.federation
    _await_nodes(grid, federation.num_clients)
    run_cell(each, folder, ForeignGrid(grid), federation.num_clients, evaluator.initial(), evaluator, lambda _: None)


def _await_nodes(grid: Grid, wanted: int) -> None:
    """Wait until Flower's nodes are there; Flower's own sampling would wait for ever."""
    end = time.monotonic() + NODES_TIMEOUT_S
    while (found := len(list(grid.get_node_ids()))) < wanted:
        if time.monotonic() > end:
            raise GridError(
                "nodes-missing", f"{found} of {wanted} nodes connected within {NODES_TIMEOUT_S:g} s; scenario.clients"
            )
        time.sleep(0.2)
