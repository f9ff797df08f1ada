"""Arrays on disk: the same values, in the same order, and out of memory while they wait."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from trellis import flower, memory, records
from trellis.grids.base import Layer
from trellis.grids.local import LocalGrid
from trellis.grids.ordered import Ordered
from trellis.grids.screened import Screened
from trellis.memory import Spill, SpilledArray
from trellis.scenario import Screening

flower.enter_run()
CLIENTS = 12


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGE", 1)
    monkeypatch.setattr(memory, "PIECE", 1 << 14)  # several pieces an array


def message_with(values: dict[str, Any]) -> Message:
    sent = flower.number([Message(RecordDict(), flower.node_of(0), "train")])[0]
    content = RecordDict({"arrays": records.array_record(values), "metrics": MetricRecord({"num-examples": 1})})
    return flower.reply(content, sent)


def train_app(flipped: Iterable[int] = ()) -> ClientApp:
    """Clients that take a step in a common direction and one of their own; some turn it round."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        common, own = np.random.default_rng(1), np.random.default_rng(100 + client)
        arrays = {}
        for name, array in message.content["arrays"].items():
            step = common.normal(0, 0.05, array.shape) + own.normal(0, 0.02, array.shape)
            arrays[name] = (records.view(array) + (-1 if client in flipped else 1) * step).astype(array.dtype)
        content = RecordDict({"arrays": records.array_record(arrays)})
        content["metrics"] = MetricRecord({"num-examples": 1 + client, "loss": 0.5})
        return Message(content, reply_to=message)

    return app


def messages() -> list[Message]:
    draw = np.random.default_rng(0)
    # Two dtypes, so that the model is not handled as one small array: each is on its own, in memory and on disk.
    values = {"w": draw.normal(size=(300, 200)).astype(np.float32), "b": draw.normal(size=70)}
    content = RecordDict({"arrays": records.array_record(values), "config": ConfigRecord()})
    return [Message(content, flower.node_of(client), "train") for client in range(CLIENTS)]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (40, 1000)])
def test_what_is_spilled_is_read_back(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    spill = Spill(tmp_path)
    values = [(100 * np.random.default_rng(i).normal(size=shape)).astype(dtype) for i in range(3)]
    kept = [spill.keep(each) for each in values]
    for each, spilled in zip(values, kept, strict=True):
        array = SpilledArray(spilled)
        np.testing.assert_array_equal(array.view(), each)
        assert (array.view().dtype, array.shape, array.nbytes) == (each.dtype, shape, each.nbytes)
        assert array.value_dtype == each.dtype
        assert not array.view().flags.writeable
        assert array.numpy().flags.writeable
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_pieces_are_written_back_if_asked(tmp_path: Path, everything_is_large: None) -> None:
    spilled = Spill(tmp_path).zeros((3, 20_000), np.dtype(np.float32))
    for start, piece in spilled.pieces(write=True):
        piece += np.arange(start, start + piece.size, dtype=np.float32)
    for _, piece in spilled.pieces():
        piece += 1
    np.testing.assert_array_equal(spilled.read(), np.arange(60_000, dtype=np.float32).reshape(3, 20_000))


def test_a_strided_array_keeps_its_values(tmp_path: Path) -> None:
    values = np.arange(12.0).reshape(3, 4).T
    np.testing.assert_array_equal(Spill(tmp_path).keep(values).read(), values)


def test_a_large_reply_goes_to_disk_and_stays_the_same_message(tmp_path: Path) -> None:
    values = np.ones(memory.LARGE // 4, np.float32)
    message = message_with({"w": values})
    before, record = records.digest(message.content["arrays"]), message.content["arrays"]
    assert memory.spill(message, tmp_path)
    assert records.digest(message.content["arrays"]) == before
    assert type(message.content["arrays"]["w"]) is SpilledArray
    assert type(record["w"]) is records.LiveArray, "a record that others may hold was changed"
    assert records.content_bytes(message.content) == values.nbytes + 8
    assert memory.spill(message, tmp_path), "it is there already"


def test_small_replies_and_errors_stay_in_memory(tmp_path: Path) -> None:
    message = message_with({"w": np.ones(memory.LARGE // 4 - 1, np.float32)})
    assert not memory.spill(message, tmp_path)
    assert type(message.content["arrays"]["w"]) is records.LiveArray
    sent = flower.number([Message(RecordDict(), flower.node_of(0), "train")])[0]
    assert not memory.spill(flower.failure(sent, flower.FAILED_CLIENT, "no"), tmp_path)


@pytest.mark.parametrize("flipped", [(), (0,), (2, 7), (5, 11)])
def test_the_gate_decides_the_same_whether_replies_wait_in_memory_or_on_disk(
    monkeypatch: pytest.MonkeyPatch, flipped: tuple[int, ...]
) -> None:
    def decided() -> tuple[list[tuple[int, str]], list[Any]]:
        grid = Screened(LocalGrid(train_app(flipped), CLIENTS), Screening())
        replies = []
        for reply in grid.stream(messages()):
            client = flower.client_of(reply.metadata.src_node_id)
            said = reply.error.reason if reply.has_error() else records.digest(reply.content["arrays"])
            replies.append((client, said))
        return replies, list(grid.measured.values())

    in_memory = decided()
    monkeypatch.setattr(memory, "LARGE", 1)
    monkeypatch.setattr(memory, "PIECE", 1 << 14)
    assert decided() == in_memory
    assert [client for client, said in in_memory[0] if said.startswith("direction")] == sorted(flipped)


def test_what_the_gate_holds_back_is_not_in_memory(everything_is_large: None) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Watched(Layer):
        def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
            for reply in super().stream(messages, timeout=timeout):
                alive.append(sum(array() is not None for array in made))
                made.append(weakref.ref(reply.content["arrays"]["w"]))
                yield reply
                del reply

    gc.disable()
    try:
        for reply in Screened(Watched(LocalGrid(train_app(), CLIENTS)), Screening()).stream(messages()):
            assert reply.has_content()
            del reply
    finally:
        gc.enable()
    assert alive == [0] * CLIENTS


def test_early_replies_wait_on_disk_and_come_in_order(everything_is_large: None) -> None:
    class Reversed(Layer):
        def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
            return reversed(list(super().stream(messages, timeout=timeout)))

    plain = list(LocalGrid(train_app(), CLIENTS).stream(messages()))
    ordered = list(Ordered(Reversed(LocalGrid(train_app(), CLIENTS))).stream(messages()))
    assert [type(reply.content["arrays"]["w"]) for reply in ordered] == [records.LiveArray] + [SpilledArray] * (
        CLIENTS - 1
    )
    for ours, theirs in zip(ordered, plain, strict=True):
        assert records.digest(ours.content["arrays"]) == records.digest(theirs.content["arrays"])


def test_freed_memory_can_be_given_back() -> None:
    held = [np.ones(2**18) for _ in range(8)]
    del held
    memory.trim()


def test_a_record_of_arrays_on_disk_can_be_sent_on(everything_is_large: None, tmp_path: Path) -> None:
    message = message_with({"w": np.arange(5.0)})
    memory.spill(message, tmp_path)
    content = records.from_bytes(records.to_bytes(message.content))
    np.testing.assert_array_equal(records.view(content["arrays"]["w"]), np.arange(5.0))
    copy = ArrayRecord({"w": message.content["arrays"]["w"]})
    np.testing.assert_array_equal(copy["w"].numpy(), np.arange(5.0))
