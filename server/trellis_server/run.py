"""Run one cell of an experiment on a grid: layers around it, a strategy, the loop, a summary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import Strategy

from trellis import records
from trellis.grids.base import StreamGrid
from trellis.grids.ordered import Ordered
from trellis.grids.screened import Screened
from trellis.grids.traced import Traced
from trellis.runs import CellFolder, read_lines, write_json
from trellis.scenario import Scenario
from trellis_server.loop import Evaluate, Loop
from trellis_server.probe import summarise
from trellis_server.strategies import build_strategy

__all__ = ["build_strategy", "layered", "run_cell"]


def layered(grid: StreamGrid, scenario: Scenario, strategy: Strategy) -> StreamGrid:
    """Wrap a grid: replies in the order of dispatch, then the admission gate, then the tracer."""
    expected: Callable[[Message], Any] | None = getattr(strategy, "expected_reply", None)
    problem_with: Callable[[Message, Message], str | None] | None = getattr(strategy, "problem_with", None)
    return Traced(Screened(Ordered(grid), scenario.screening, expected=expected, problem_with=problem_with))


def run_cell(
    scenario: Scenario,
    folder: CellFolder,
    grid: StreamGrid,
    num_clients: int,
    initial: Callable[[], ArrayRecord],
    evaluate: Evaluate,
    on_round: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run a cell to its end, from its checkpoint if it has one, and write its ``summary.json``.

    Args:
        scenario: complete, without variants.
        folder: the cell's.
        grid: the clients, without layers.
        num_clients: clients of the federation.
        initial: makes the arrays to start from.
        evaluate: central evaluation.
        on_round: called with each line of ``metrics.jsonl``.

    Returns:
        The summary.

    Raises:
        ScenarioError: the strategy cannot be built for this federation.
        RoundError: see ``Loop.run``.
    """
    strategy = build_strategy(scenario, num_clients, folder.seed)
    loop = Loop(
        scenario=scenario,
        seed=folder.seed,
        strategy=strategy,
        fresh=build_strategy(scenario, num_clients, folder.seed),
        grid=layered(grid, scenario, strategy),
        evaluate=evaluate,
        folder=folder,
        cell=folder.name,
        on_round=on_round,
    )
    arrays = loop.run(initial())  # with no name of its own here, the first model goes when the second comes
    lines = read_lines(folder.path / "metrics.jsonl")
    summary = {
        "variant": folder.variant,
        "seed": folder.seed,
        "rounds": lines[-1]["round"],
        "metric": getattr(evaluate, "metric", None),  # what is compared, and which way is better
        "final": {key: lines[-1][key] for key in ("central", "federated")},
        "sha256": records.digest(arrays),
        "overhead": summarise([line["probe"] for line in lines if line["probe"]]),
        "seconds": sum(line["seconds"] for line in lines),
        "bytes_up": sum(line["bytes_up"] for line in lines),
        "bytes_down": sum(line["bytes_down"] for line in lines),
    }
    (folder.path / "model.safetensors").write_bytes(_weights(arrays))
    write_json(folder.path / "summary.json", summary)
    return summary


def _weights(arrays: ArrayRecord) -> bytes:
    """Return the final model as plain safetensors: array names as they are, readable by any tool."""
    import numpy as np
    from safetensors.numpy import save

    blob: bytes = save({name: np.asarray(records.view(array), order="C") for name, array in arrays.items()})
    return blob
