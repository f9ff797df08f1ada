"""From a scenario to a federation: read the data, deal them out, and check that the trainer takes their kind."""

from __future__ import annotations

import json
from functools import lru_cache

from trellis import registry
from trellis.data.base import KINDS, DataSet, Federation
from trellis.errors import DataError, listed, nearest
from trellis.scenario import Scenario, config_of, from_mapping, plain

_KEPT = 2
"""Data sets and federations kept per process. They may be large, and cells of a run come one after another."""


def load_federation(scenario: Scenario, seed: int) -> Federation:
    """Return the scenario's data dealt out to its clients.

    What was read is kept for the life of the process, so files that change while it runs are not noticed.

    Raises:
        DataError: data are missing or damaged, cannot be dealt out as asked, or are of a kind that the trainer
            does not take.
        PluginError: a plug-in's name is unknown, or it does not load.
        ScenarioError: a parameter of the data set or the partitioner is wrong.
    """
    whole = plain(scenario)
    # The key is the very text that the data are loaded from, so two scenarios share them only if they must.
    key = json.dumps({part: whole[part] for part in ("data", "partition", "clients", "base")}, sort_keys=True)
    federation = _load(key, seed)
    takes = registry.info_of(registry.load("trainers", scenario.trainer.name, base=scenario.folder)).facts.get("takes")
    if takes is not None and federation.data.kind not in takes:
        raise DataError(
            "data-kind",
            f"trainer {scenario.trainer.name!r} takes {listed(takes)} data, but data {scenario.data.name!r} are"
            f" {federation.data.kind!r}",
        )
    return federation


def load_data(scenario: Scenario, seed: int) -> DataSet:
    """Return the scenario's data, not dealt out: for a worker that is told which rows each client holds.

    Raises:
        DataError: data are missing or damaged, or not of the kind their plug-in declares.
        PluginError: the data set's name is unknown, or it does not load.
        ScenarioError: a parameter of the data set is wrong.
    """
    whole = plain(scenario)
    return _data(json.dumps({part: whole[part] for part in ("data", "base")}, sort_keys=True), seed)


@lru_cache(maxsize=_KEPT)
def _load(key: str, seed: int) -> Federation:
    given = json.loads(key)
    scenario = from_mapping({"name": "data", **given})
    partitioner, config = config_of(scenario, "partitioners")
    data = _data(json.dumps({part: given[part] for part in ("data", "base")}, sort_keys=True), seed)
    federation = partitioner(config).deal(data, scenario.clients, seed)
    assert isinstance(federation, Federation), type(federation)
    return federation


@lru_cache(maxsize=_KEPT)
def _data(key: str, seed: int) -> DataSet:
    """Read the data; ways to deal them out that are compared share one copy."""
    scenario = from_mapping({"name": "data", **json.loads(key)})
    source, config = config_of(scenario, "datasets")
    data = source(config, scenario.folder).load(seed)
    assert isinstance(data, DataSet), type(data)
    declared = registry.info_of(source).facts.get("kind")
    if data.kind not in KINDS:
        raise DataError(
            "data-kind",
            f"data {scenario.data.name!r} are of kind {data.kind!r}.{nearest(data.kind, KINDS)} Kinds: {listed(KINDS)}",
        )
    if declared is not None and data.kind != declared:
        raise DataError(
            "data-kind", f"data {scenario.data.name!r} declare kind {declared!r} but loaded as {data.kind!r}"
        )
    return data
