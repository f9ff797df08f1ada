"""Replies in the order of their messages, whatever order the grid beneath has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from trellis import flower
from trellis.grids.base import Layer
from trellis.grids.local import LocalGrid
from trellis.grids.ordered import Ordered


def local_grid() -> LocalGrid:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: object) -> Message:
        return flower.reply(RecordDict({"metrics": MetricRecord({"x": 1})}), message)

    return LocalGrid(app, 6)


class Shuffled(Layer):
    """Yields the replies at the given places; the same place twice is a duplicate."""

    def __init__(self, inner: LocalGrid, order: list[int]) -> None:
        super().__init__(inner)
        self.order = order
        self.yielded = 0

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        replies = list(super().stream(messages, timeout=timeout))
        for place in self.order:
            self.yielded += 1
            yield replies[place]


def messages(grid: Layer) -> list[Message]:
    return [grid.create_message(RecordDict(), "train", node, "1") for node in grid.get_node_ids()]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ([5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]),
        ([0, 2, 1, 2, 0, 4, 3, 3, 5, 5], [0, 1, 2, 3, 4, 5]),
        ([5, 3, 1], [1, 3, 5]),
        ([], []),
    ],
    ids=["reversed", "duplicates", "missing", "none"],
)
def test_replies_come_in_the_order_of_their_messages(order: list[int], expected: list[int]) -> None:
    grid = Ordered(Shuffled(local_grid(), order))
    replies = list(grid.stream(messages(grid)))
    assert [flower.client_of(reply.metadata.src_node_id) for reply in replies] == expected


def test_a_reply_whose_turn_it_is_does_not_wait_for_others() -> None:
    inner = Shuffled(local_grid(), [0, 2, 1, 3, 4, 5])
    stream = Ordered(inner).stream(messages(inner))
    seen = [(flower.client_of(next(stream).metadata.src_node_id), inner.yielded) for _ in range(4)]
    assert seen == [(0, 1), (1, 3), (2, 3), (3, 4)]


def test_a_reply_to_an_unknown_message_passes_at_once() -> None:
    class Chatty(Layer):
        def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
            first, *rest = super().stream(messages, timeout=timeout)
            yield from rest
            (stranger,) = flower.number([self.create_message(RecordDict(), "train", flower.node_of(77), "1")])
            yield flower.reply(RecordDict(), stranger)
            yield first

    grid = Ordered(Chatty(local_grid()))
    clients = [flower.client_of(reply.metadata.src_node_id) for reply in grid.stream(messages(grid))]
    assert clients == [77, 0, 1, 2, 3, 4, 5]


def test_ids_that_the_grid_beneath_gives_as_it_sends_are_followed() -> None:
    class Renumbering(Layer):
        def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
            sent = list(messages)
            for number, message in enumerate(sent):
                message.metadata.__dict__["_message_id"] = f"own-{number}"
            yield from reversed(list(super().stream(sent, timeout=timeout)))

    grid = Ordered(Renumbering(local_grid()))
    clients = [flower.client_of(reply.metadata.src_node_id) for reply in grid.stream(messages(grid))]
    assert clients == [0, 1, 2, 3, 4, 5]
