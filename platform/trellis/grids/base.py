"""What our grids add to Flower's ``Grid``: replies as a stream, contexts of clients, and layers.

A grid is where clients are; a layer is what happens on the way, and wraps any grid, Flower's own too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from trellis import flower


class StreamGrid(Grid):
    """A Flower ``Grid`` whose replies can be taken one by one, so that they need not all be held.

    ``stream`` yields exactly one reply per message: content, or an error with its reason. It ends when
    all have come or at the deadline, whichever is first; messages still open then get an error reply.
    """

    _run: Run

    @abstractmethod
    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send messages and yield one reply each, in any order. ``timeout`` in seconds."""

    def close(self) -> None:
        """Give back what the grid holds. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return list(self.stream(messages, timeout=timeout))


class ClientGrid(StreamGrid):
    """A grid over simulated clients ``0 .. num_clients - 1``, with the private state of those that have any.

    Attributes:
        states: Flower ``Context.state`` by client number, only of clients that keep something.
        changed: clients whose state changed since the caller last emptied this set (for checkpoints).
        in_process: whether clients run in this process, so that its CPU time is theirs too.
        replays: whether clients may be asked to repeat a round's steps bare, for the overhead. It doubles their work.
    """

    in_process: ClassVar[bool] = True
    replays: ClassVar[bool] = True

    def __init__(self, num_clients: int) -> None:
        self._run = flower.enter_run()
        # Made once: Flower copies the ids into a list in every round, which from a range takes thirty times as long.
        self._nodes = tuple(range(flower.node_of(0), flower.node_of(num_clients)))
        self._finished: dict[str, Message] = {}
        self.states: dict[int, RecordDict] = {}
        self.changed: set[int] = set()

    @property
    def workers(self) -> int:
        """How many clients can be at work at once."""
        return 1

    def get_node_ids(self) -> Iterable[int]:
        return self._nodes

    def keep_state(self, client: int, state: RecordDict) -> None:
        """Store what a client keeps for itself; forget clients that keep nothing."""
        if len(state):
            self.states[client] = state
            self.changed.add(client)
        elif self.states.pop(client, None) is not None:
            self.changed.add(client)

    def forget(self) -> None:
        """Start over with clients that keep nothing, e.g. for the next seed on the same workers."""
        self.states, self.changed = {}, set()

    def remembered(self) -> dict[str, Any]:
        """Return what a checkpoint has to keep of the way to the clients, as plain JSON data; here nothing."""
        return {}

    def recall(self, kept: Mapping[str, Any] | None) -> None:
        """Take back what ``remembered`` returned: {} in a new run, None from a checkpoint that does not say."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbered = flower.number(messages)
        for reply in self.stream(numbered):
            self._finished[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in numbered]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._finished.pop(i) for i in message_ids if i in self._finished]


class Layer(StreamGrid):
    """A grid around a grid. By itself it changes nothing; a layer overrides ``stream``.

    Flower's plain grids have no ``stream``; theirs is ``send_and_receive``, whose replies come at the end.
    """

    def __init__(self, inner: Grid) -> None:
        self.inner = inner

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        if isinstance(self.inner, StreamGrid):
            return self.inner.stream(messages, timeout=timeout)
        return iter(self.inner.send_and_receive(messages, timeout=timeout))

    def set_run(self, run: Run) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Run:
        return self.inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self.inner.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self.inner.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.inner.pull_messages(message_ids)

    def close(self) -> None:
        if isinstance(self.inner, StreamGrid):
            self.inner.close()


def innermost(grid: Grid) -> Grid:
    """Return the grid beneath all layers."""
    while isinstance(grid, Layer):
        grid = grid.inner
    return grid
