"""Replies do not pile up: while a client is at work, nothing holds the reply of the one before it."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from federations import DIGITS, run, sha
from trellis import flower, memory, records
from trellis.grids.local import LocalGrid
from trellis.grids.ordered import Ordered
from trellis.grids.screened import Screened
from trellis.grids.traced import Traced
from trellis.scenario import Screening
from trellis_clients.contract import site_of
from trellis_clients.site import Site
from trellis_server import folding
from trellis_server.loop import Count


@pytest.mark.parametrize(
    ("settings", "most"), [(Screening(enabled=False), 0), (Screening(), 5)], ids=["no gate", "gate"]
)
def test_a_reply_is_gone_when_the_next_client_works_unless_the_gate_waits_for_a_cohort(settings, most):
    app, made, alive = ClientApp(), [], []

    @app.train()
    def train(message, context):
        alive.append(sum(reply() is not None for reply in made))
        values = np.ones(4, np.float32) + 0.01 * context.node_config["partition-id"]
        content = RecordDict({"arrays": records.array_record({"w": values})})
        content["metrics"] = MetricRecord({"num-examples": 1, "loss": 0.5})
        return Message(content, reply_to=message)

    grid = LocalGrid(app, 12, after_reply=lambda reply: made.append(weakref.ref(reply)))
    sent = RecordDict({"arrays": records.array_record({"w": np.zeros(4, np.float32)}), "config": ConfigRecord()})
    messages = [Message(sent, flower.node_of(client), "train") for client in range(12)]
    gc.disable()  # what is gone must be gone by itself, not by a collection that may come too late
    try:
        count = Count()
        folding.folded(FedAvg(), count(Traced(Screened(Ordered(grid), settings)).stream(messages)))
    finally:
        gc.enable()
    assert count.good == 12
    assert max(alive) == most
    assert alive[-5:] == [0] * 5  # the gate waits for its first six only
    assert sum(reply() is not None for reply in made) == 0


def test_the_first_model_is_gone_after_the_first_round(tmp_path, monkeypatch):
    made = []
    initial = Site.initial

    def watched(site):
        arrays = initial(site)
        made.append(weakref.ref(next(iter(arrays.values()))))
        return arrays

    monkeypatch.setattr(Site, "initial", watched)
    alive = []
    run(tmp_path, on_round=lambda _, line: alive.append(made[0]() is not None))
    assert alive == [True, False, False, False, False]


def test_gradients_do_not_stay_with_the_model(tmp_path, monkeypatch):
    train, left = Site.train, []

    def watched(site, turn, state):
        content = train(site, turn, state)
        left.append([name for name, p in site.model.named_parameters() if p.grad is not None])
        return content

    monkeypatch.setattr(Site, "train", watched)
    _, outcome = run(tmp_path)
    assert not outcome.failed
    assert left == [[]] * 16  # four clients in each of four rounds


def test_a_large_model_that_rests_holds_nothing_and_evaluates_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 1)
    path = tmp_path / "scenario.yaml"
    path.write_text(DIGITS)
    site = site_of(path)
    arrays = site.initial()
    before = site.evaluate_centrally(arrays, 1)
    site.rest()
    site.rest()
    assert all(parameter.untyped_storage().nbytes() == 0 for parameter in site.model.parameters())
    assert site.evaluate_centrally(arrays, 1) == before
    assert all(parameter.untyped_storage().nbytes() > 0 for parameter in site.model.parameters())


def test_with_large_models_a_run_gives_the_same_bits(tmp_path, monkeypatch):
    small = sha(tmp_path)
    monkeypatch.setattr(memory, "LARGE", 1)
    assert sha(tmp_path) == small
    assert not list(tmp_path.rglob("tmp*")), "nothing that waited on disk is left there"
