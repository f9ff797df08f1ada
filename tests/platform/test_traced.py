"""The tracing layer counts what passes and changes none of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from trellis import flower
from trellis.grids.local import LocalGrid
from trellis.grids.screened import Screened
from trellis.grids.traced import Failure, ReplyTrace, Traced, Traffic
from trellis.records import TIMING, array_record, content_bytes
from trellis.scenario import Screening

CLIENTS = 3
Answer = Callable[[int, Message], RecordDict]


def trained(client: int, message: Message) -> RecordDict:
    values = np.full(8, 1.0 + client, np.float32)
    values[0] = 0.5
    return RecordDict(
        {
            "arrays": array_record({"weight": values}),
            "metrics": MetricRecord({"num-examples": 10 + client, "loss": 0.25, "history": [1.0, 2.0]}),
            TIMING: ConfigRecord({"seconds": 1.5 + client, "cpu_seconds": 1.0}),
        }
    )


def broken(client: int, message: Message) -> RecordDict:
    if client == 1:
        raise ValueError("no data\nhere")
    return trained(client, message)


def nonfinite(client: int, message: Message) -> RecordDict:
    content = trained(client, message)
    if client == 1:
        content["arrays"]["weight"] = Array(np.full(8, np.nan, np.float32))
    return content


def app_of(answer: Answer) -> ClientApp:
    app = ClientApp()

    def run(message: Message, context: Context) -> Message:
        return Message(answer(int(context.node_config["partition-id"]), message), reply_to=message)

    for register in (app.train(), app.evaluate(), app.query()):
        register(run)
    return app


def messages_to(clients: Iterable[int], kind: str = "train") -> list[Message]:
    arrays = array_record({"weight": np.linspace(0, 1, 8, dtype=np.float32)})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": 0.1})})
    return [Message(content, flower.node_of(client), kind) for client in clients]


def test_bytes_are_counted_for_each_client_and_replies_pass_untouched() -> None:
    passed: list[Message] = []
    traces: list[ReplyTrace] = []
    grid = Traced(LocalGrid(app_of(trained), CLIENTS, after_reply=passed.append), traces.append)
    messages = messages_to(range(CLIENTS))
    replies = grid.send_and_receive(messages)

    assert [id(reply) for reply in replies] == [id(reply) for reply in passed]
    down = 8 * 4 + 8  # eight float32, one number of the config
    up = 8 * 4 + 2 * 8 + 2 * 8 + 2 * 8  # arrays, two metrics, a list of two, two times
    assert content_bytes(messages[0].content) == down
    assert grid.take() == Traffic(CLIENTS * down, CLIENTS * up, CLIENTS, [])
    assert traces[1] == ReplyTrace(
        client=1,
        phase="train",
        ok=True,
        reason=None,
        metrics={"num-examples": 11, "loss": 0.25},
        seconds=2.5,
        cpu_seconds=1.0,
        bytes_up=up,
        message_id=messages[1].metadata.message_id,
    )


def test_taking_starts_anew() -> None:
    grid = Traced(LocalGrid(app_of(broken), CLIENTS))
    grid.send_and_receive(messages_to(range(CLIENTS)))
    first = grid.take()
    assert grid.take() == Traffic()
    grid.send_and_receive(messages_to(range(CLIENTS)))
    assert grid.take() == first
    assert len(first.failures) == 1


@pytest.mark.parametrize(
    ("kind", "phase"), [("train", "train"), ("train.moments", "train"), ("evaluate", "evaluate"), ("query", "query")]
)
def test_a_failure_names_client_phase_and_reason_in_one_line(kind: str, phase: str) -> None:
    def moments(message: Message, context: Context) -> Message:
        return Message(broken(1, message), reply_to=message)

    app = app_of(broken)
    app.train("moments")(moments)
    traces: list[ReplyTrace] = []
    grid = Traced(LocalGrid(app, CLIENTS), traces.append)
    grid.send_and_receive(messages_to([1], kind))
    [failure] = grid.failures
    assert (failure.client, failure.phase) == (1, phase)
    assert failure.reason.endswith("ValueError: no data")
    assert [(trace.ok, trace.bytes_up, trace.seconds, trace.metrics) for trace in traces] == [(False, 0, None, {})]


def test_what_the_gate_refused_is_a_failure_and_its_measures_can_be_looked_up() -> None:
    gate = Screened(LocalGrid(app_of(nonfinite), CLIENTS), Screening())
    norms: dict[int, float] = {}

    def look_up(trace: ReplyTrace) -> None:
        if trace.ok:
            norms[trace.client], _ = gate.measured[trace.message_id]

    grid = Traced(gate, look_up)
    grid.send_and_receive(messages_to(range(CLIENTS)))
    assert grid.failures == [Failure(1, "train", "nonfinite: arrays/weight has 8 values that are not finite")]
    assert list(norms) == [0, 2]
    assert all(norm > 0 for norm in norms.values())


@pytest.mark.parametrize("said", [float("nan"), float("inf"), -1.0, "long", [1.0], b"1"], ids=repr)
def test_a_time_that_is_none_is_not_believed(said: Any) -> None:
    def answer(client: int, message: Message) -> RecordDict:
        return RecordDict({TIMING: ConfigRecord({"seconds": said})})

    traces: list[ReplyTrace] = []
    Traced(LocalGrid(app_of(answer), 1), traces.append).send_and_receive(messages_to([0], "query"))
    assert [(trace.ok, trace.seconds) for trace in traces] == [(True, None)]


def test_a_reply_is_counted_when_it_passes_not_at_the_end() -> None:
    grid = Traced(LocalGrid(app_of(trained), CLIENTS))
    stream = grid.stream(messages_to(range(CLIENTS)))
    next(stream)
    once = grid.bytes_up
    assert once > 0
    next(stream)
    assert grid.bytes_up == 2 * once
    assert grid.messages == CLIENTS


def test_pushed_and_pulled_messages_are_counted_too() -> None:
    streamed, pushed = (Traced(LocalGrid(app_of(broken), CLIENTS)) for _ in range(2))
    streamed.send_and_receive(messages_to(range(CLIENTS)))
    assert len(list(pushed.pull_messages(pushed.push_messages(messages_to(range(CLIENTS)))))) == CLIENTS
    assert pushed.take() == streamed.take()
