"""The two halves as plain Flower apps, over grids that behave as Flower's do: random node ids, ids of their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Context, Message, RecordDict
from flwr.serverapp import Grid

import federations
import trellis_clients.app
import trellis_server.app
from trellis import flower, flower_app
from trellis.errors import GridError, ScenarioError
from trellis.grids.foreign import ForeignGrid, Numbered
from trellis.grids.local import run_client
from trellis.records import LiveArray
from trellis.runs import read_lines, read_status


class FlowerLike(Grid):
    """Push and pull alone, as Flower's in-memory grid: it keeps the very messages it is given, under its own ids,
    and answers them only when asked, each node with a context of its own."""

    def __init__(self, nodes: Mapping[int, Mapping[str, Any]], run_config: Mapping[str, Any]) -> None:
        self._run = flower.enter_run()
        self.contexts = {
            node: Context(self._run.run_id, node, dict(config), RecordDict(), dict(run_config))
            for node, config in nodes.items()
        }
        self.kept: dict[str, Message] = {}
        self.ids = itertools.count(1)
        self.deaf: set[int] = set()
        self.refuses: set[int] = set()

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        taken = []
        for message in messages:
            flower.rename(message, f"theirs-{next(self.ids)}")
            if message.metadata.dst_node_id not in self.refuses:
                self.kept[message.metadata.message_id] = message
                taken.append(message.metadata.message_id)
        return taken

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return list(self._answers(message_ids))

    def _answers(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for name in reversed(list(message_ids)):
            message = self.kept[name]
            node = message.metadata.dst_node_id
            if node in self.deaf:
                continue
            assert message.metadata.message_id == name, "a message was changed after it was pushed"
            context = self.contexts[node]
            reply, context.state = run_client(trellis_clients.app.app, self.kept.pop(name), context)
            yield reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


def nodes(count: int, of: int | None = None) -> dict[int, dict[str, Any]]:
    """Return node configs under ids whose order is not that of the partitions, as Flower's random ids."""
    ids = sorted(2**63 + (i * 2654435761) % 2**32 for i in range(1, count + 1))
    return {node: {"partition-id": (i * 7 + 3) % count, "num-partitions": of or count} for i, node in enumerate(ids)}


def serve(grid: Grid, run_config: dict[str, Any]) -> Path:
    """Run the server app and return the run's folder."""
    runs = Path(str(run_config["runs"]))
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)
    try:
        trellis_server.app.app(grid=grid, context=context)
    finally:
        folders = list(runs.glob("*/*"))
    (folder,) = folders
    return folder


def config_in(folder: Path, **values: Any) -> dict[str, Any]:
    return {"scenario": str(federations.write(folder)), "runs": str(folder / "flower"), **values}


def test_flowers_nodes_give_the_bits_of_our_own_grid(tmp_path):
    config = config_in(tmp_path, seed=3, set="rounds.count=2; trainer.momentum=0.9")
    folder = serve(FlowerLike(nodes(6), config), config)
    cell = folder / "cells" / "main-seed3"
    own, outcome = federations.run(tmp_path, ("seeds=3", "rounds.count=2", "trainer.momentum=0.9"))
    assert f'"sha256": "{outcome.summaries[0]["sha256"]}"' in (cell / "summary.json").read_text()
    assert read_status(folder)["state"] == "complete"
    assert (folder / "report.html").is_file()
    own_rows = federations.lines(own, "clients.jsonl", "main-seed3")
    rows = read_lines(cell / "clients.jsonl")
    assert [row["client"] for row in rows] == [row["client"] for row in own_rows]
    assert all(row["ok"] for row in rows)


def test_a_client_that_is_not_reached_or_not_heard_is_a_failure_of_its_own(tmp_path):
    config = config_in(
        tmp_path, set="rounds.count=1; rounds.clients_per_round=6; rounds.deadline_s=0.5; rounds.quorum=0.5"
    )
    grid = FlowerLike(nodes(6), config)
    layers = Numbered(ForeignGrid(grid), 6)
    there = layers.call_roll()
    grid.refuses, grid.deaf = {there[0]}, {there[5]}
    messages = [Message(RecordDict(), node, "query.partition") for node in layers.get_node_ids()]
    replies = {flower.client_of(reply.metadata.src_node_id): reply for reply in layers.stream(messages, timeout=0.5)}
    assert sorted(replies) == [0, 1, 2, 3, 4, 5]
    assert {client for client, reply in replies.items() if reply.has_error()} == {0, 5}
    assert "did not take" in replies[0].error.reason
    assert "deadline" in replies[5].error.reason
    sent = {message.metadata.message_id for message in messages}
    assert {reply.metadata.reply_to_message_id for reply in replies.values()} == sent


def test_a_node_that_left_fails_and_one_that_comes_is_asked(tmp_path):
    config = config_in(tmp_path)
    grid = FlowerLike(nodes(3), config)
    layers = Numbered(ForeignGrid(grid), 3)
    node = layers.call_roll()[1]
    message = Message(RecordDict(), flower.node_of(1), "query.partition")
    context = grid.contexts.pop(node)
    (reply,) = layers.stream([message])
    assert reply.has_error()
    assert "left" in reply.error.reason
    assert [flower.client_of(n) for n in layers.get_node_ids()] == [0, 2]
    grid.contexts[17] = context  # the same partition under a new id, as after a restart
    (reply,) = layers.stream([message])
    assert not reply.has_error()
    assert [flower.client_of(n) for n in layers.get_node_ids()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (nodes(2), "counts 2 partitions, and the scenario has 6 clients"),
        ({**nodes(6), 5: {"partition-id": 0, "num-partitions": 6}}, "holds partition 0, and so does"),
        ({**nodes(6), 5: {"partition-id": 6}}, "'partition-id' is 6"),
        ({**nodes(6), 5: {}}, "'partition-id' is None"),
    ],
    ids=["too-few", "twice", "beyond", "nameless"],
)
def test_nodes_that_do_not_fit_the_scenario_end_the_run_at_once(tmp_path, held, reason):
    config = config_in(tmp_path)
    with pytest.raises(GridError) as error:
        serve(FlowerLike(held, config), config)
    assert error.value.code == "node-partition"
    assert reason in str(error.value)
    (folder,) = (tmp_path / "flower").glob("*/*")
    status = read_status(folder)
    assert status["state"] == "failed"
    assert reason in status["error"]


def test_a_relative_scenario_is_looked_for_in_the_apps_folder(tmp_path, monkeypatch):
    app = tmp_path / "apps" / "unpacked"
    app.mkdir(parents=True)
    path = federations.write(app)
    monkeypatch.setattr("sys.path", [str(tmp_path), str(app)])
    with pytest.raises(ScenarioError, match="not a file in the Flower app's folder"):
        flower_app.read({"scenario": "digits.yaml"})
    (app / "pyproject.toml").write_text("")
    assert flower_app.find("digits.yaml") == path
    assert flower_app.read({"scenario": "digits.yaml"}).seeds == (0,)


def test_the_run_config_picks_variant_and_seed(tmp_path):
    path = federations.write(tmp_path, federations.DIGITS + "seeds: [4, 5]\nvariants: {a: {}, b: {trainer: fedprox}}\n")
    named = flower_app.read({"scenario": str(path), "variant": "b", "seed": 9})
    assert (named.trainer.name, named.seeds, named.variants) == ("fedprox", (9,), {})
    first = flower_app.read({"scenario": str(path), "variant": "", "seed": -1})
    assert (first.trainer.name, first.seeds) == ("sgd", (4,))
    with pytest.raises(ScenarioError, match="Did you mean 'a'"):
        flower_app.read({"scenario": str(path), "variant": "aa"})
    with pytest.raises(ScenarioError, match="no key 'scenario'"):
        flower_app.read({})


def test_our_arrays_have_flowers_wire_format():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    ours, theirs = LiveArray(values), Array(values)
    assert ours.deflate() == theirs.deflate()
    assert ours.object_id == theirs.object_id
    read = Array.inflate(ours.deflate(), ours.children)
    np.testing.assert_array_equal(read.numpy(), values)
