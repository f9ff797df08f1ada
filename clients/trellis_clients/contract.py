"""The contract every trainer keeps, as one check that anybody can run on their own.

``check(scenario_file)`` runs what the project's tests run over every bundled trainer: it builds, fits, lowers its
loss, sends finite arrays of constant names and shapes and no records but those it declares, keeps its state across a
restart, and gives the same bits for the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from trellis import flower, records, registry, scenario
from trellis.data.base import Batch
from trellis.experiment import app_module
from trellis.grids.local import LocalGrid, client_context, run_client
from trellis_clients.app import Sites, make_app
from trellis_clients.site import Cell, Site
from trellis_clients.trainer import Trainer, Turn, in_order

LEARNT = 0.01
"""Share of its first loss by which a trainer must have lowered it after ten turns on one client's own data."""


class ContractError(AssertionError):
    """A trainer does not keep the contract; the message says which clause."""


def site_of(file: Path, overrides: Sequence[str] = (), seed: int = 0) -> Site:
    """Return the live objects of a scenario's first variant."""
    _, each = scenario.expand(scenario.load(file, overrides))[0]
    return Site(Cell(scenario.plain(each), seed))


def bench(file: Path, overrides: Sequence[str] = ()) -> tuple[Trainer, nn.Module, Batch, Turn]:
    """Return a trainer, its model, one batch of client 0 and a turn, for tests of single hooks."""
    site = site_of(file, overrides)
    message = _message(site, 1, 0)
    turn = site.turn(message, 0, "train")
    site.load(turn.received[records.ARRAYS], {})
    batch = next(in_order(site.federation.client(0).train, 8))
    return site.trainer, site.model, batch, turn


def check(file: Path, overrides: Sequence[str] = ()) -> None:
    """Check the trainer of a scenario against every clause.

    Raises:
        ContractError: a clause is broken.
        TrellisError: the scenario itself is wrong.
    """
    site = site_of(file, overrides)
    first, state = _fit(site, 1, 0, RecordDict())
    _require(not first.has_error(), f"fit raised: {first.has_error() and first.error.reason}")
    _check_reply(site, first)

    again, _ = _fit(site_of(file, overrides), 1, 0, RecordDict())
    same = records.digest(first.content["arrays"]) == records.digest(again.content["arrays"])  # type: ignore[arg-type]
    _require(same, "the same seed gave other bits")

    # Another client's turn in between must leave no trace: the worker's one model is put back each time.
    _fit(site, 1, 1, RecordDict())
    arrays = records.array_records(first.content)[records.ARRAYS]
    kept, saved = (records.from_bytes(records.to_bytes(c)) for c in (state, RecordDict({records.ARRAYS: arrays})))
    straight, _ = _fit(site, 2, 0, state, arrays)
    restored, _ = _fit(site_of(file, overrides), 2, 0, kept, records.array_records(saved)[records.ARRAYS])
    same = records.digest(straight.content["arrays"]) == records.digest(restored.content["arrays"])  # type: ignore[arg-type]
    _require(same, "after saving and loading model and client's state a turn gave other bits")
    _check_learns(site)


def _check_reply(site: Site, reply: Message) -> None:
    sent = site.initial()
    replied = records.array_records(reply.content)
    _require(
        set(replied[records.ARRAYS]) == set(sent), "the reply's arrays are not the names that shared() gave before"
    )
    for name, array in replied[records.ARRAYS].items():
        same = (array.shape, array.dtype) == (sent[name].shape, sent[name].dtype)
        _require(same, f"array {name!r} changed shape or dtype")
    declared = registry.info_of(type(site.trainer)).facts.get("replies", ())
    for record, arrays in replied.items():
        said = record == records.ARRAYS or record in declared
        _require(said, f"it sends the record {record!r}, which its @register does not name among its replies")
        for name, array in arrays.items():
            finite = bool(torch.isfinite(torch.from_numpy(array.numpy()).double()).all())
            _require(finite, f"array {name!r} of record {record!r} is not finite")
    metrics = records.metric_records(reply.content)[records.METRICS]
    _require("loss" in metrics, "fit's metrics have no 'loss'")
    finite = all(torch.isfinite(torch.tensor(float(v))) for v in metrics.values() if not isinstance(v, list))
    _require(finite, f"metrics are not finite: {dict(metrics)}")


def _check_learns(site: Site) -> None:
    """Ten turns of one client on its own few data, as easy a set as there is, must lower the loss of fitting them."""
    arrays, state, losses = site.initial(), RecordDict(), []
    for number in range(1, 11):
        reply, state = _fit(site, number, 0, state, arrays)
        arrays = records.array_records(reply.content)[records.ARRAYS]
        losses.append(float(records.metric_records(reply.content)[records.METRICS]["loss"]))  # type: ignore[arg-type]
    # A trainer that only ever answers its strategy's questions has no fit of its own to be judged by.
    least = LEARNT if _sent(site, 1, site.initial()).metadata.message_type == "train" else 0.0
    fell = losses[-1] < losses[0] and losses[0] - losses[-1] >= least * abs(losses[0])
    _require(fell, f"the loss did not fall by {least:.0%} over ten turns: {losses[0]:.4f} to {losses[-1]:.4f}")


def _message(site: Site, number: int, client: int, arrays: Any = None) -> Message:
    """Return the message that the scenario's own strategy would send, addressed to one client, asking it to fit."""
    sent = _sent(site, number, site.initial() if arrays is None else arrays)
    return flower.number([Message(sent.content, flower.node_of(client), "train")])[0]


def _sent(site: Site, number: int, arrays: ArrayRecord) -> Message:
    """Return the first message that the scenario's own strategy sends in a round."""
    clients = site.federation.num_clients
    strategy = app_module("server").build_strategy(site.scenario, clients, site.seed)
    grid = LocalGrid(ClientApp(), clients)
    messages: list[Message] = list(strategy.configure_train(number, arrays, ConfigRecord({"num-rounds": 10}), grid))
    return messages[0]


def _fit(site: Site, number: int, client: int, state: RecordDict, arrays: Any = None) -> tuple[Message, RecordDict]:
    sites = Sites({"check": Cell({}, site.seed)})
    sites.live["check"] = site
    context = client_context(client, site.federation.num_clients, state.copy(), 1)
    return run_client(make_app(sites=sites), _message(site, number, client, arrays), context)


def _require(condition: bool, clause: str) -> None:
    if not condition:
        raise ContractError(clause)
