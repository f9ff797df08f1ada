"""Flower's own grids, made to look like ours: one reply per message, under the ids and node numbers we give."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from trellis import flower, records
from trellis.grids.base import Layer, StreamGrid
from trellis.grids.ordered import Ordered

POLL_S = 0.02
"""Flower's grids can only be asked again; its own loop asks every 0.1 to 3 s."""

ROLL_CALL = "query.partition"
"""Message type of the question which partition a node holds. The reply's config has the keys ``partition-id`` and,
where the node knows it, ``num-partitions``."""

ROLL_CALL_S = 120.0

log = logging.getLogger(__name__)


class ForeignGrid(Layer):
    """Stream replies from a grid that can only push and pull, such as Flower's in-memory or HTTP one.

    Flower gives ids to the messages it is given, and its in-memory grid keeps those very messages. So it gets
    twins of ours, and ours keep their ids.
    """

    def __init__(self, inner: Grid) -> None:
        super().__init__(inner)

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        end = None if timeout is None else time.monotonic() + timeout
        under_way, refused = self._push(flower.number(messages))
        for message in refused:
            yield flower.failure(message, flower.FAILED_WORKER, "Flower did not take the message for this node")
        while under_way:
            for reply in self.inner.pull_messages(list(under_way)):
                sent = under_way.pop(reply.metadata.reply_to_message_id)
                flower.rename_reply(reply, sent.metadata.message_id)
                yield reply
            if under_way and end is not None and time.monotonic() > end:
                break
            if under_way:
                time.sleep(POLL_S)
        for message in under_way.values():
            yield flower.failure(message, flower.FAILED_DEADLINE, f"no reply before the deadline of {timeout:g} s")

    def _push(self, messages: list[Message]) -> tuple[dict[str, Message], list[Message]]:
        """Send twins of the messages; return those that Flower took, by Flower's id, and those that it did not."""
        twins = [twin(message, message.metadata.dst_node_id) for message in messages]
        taken = set(self.inner.push_messages(twins))
        under_way, refused = {}, []
        for sent, message in zip(twins, messages, strict=True):
            if sent.metadata.message_id in taken:
                under_way[sent.metadata.message_id] = message
            else:
                refused.append(message)
        return under_way, refused


class Numbered(Layer):
    """Give nodes the number of the partition they hold, so that they are the clients of our own grids.

    Flower's node ids are random. A strategy that samples from them would draw other partitions in every run;
    of these it draws the same ones as on ``LocalGrid``. Each node is asked once which partition it holds.

    Attributes:
        left_out: why, by Flower's id, of nodes that cannot be a client of this federation. They get no messages.
    """

    def __init__(self, inner: StreamGrid, num_clients: int) -> None:
        super().__init__(inner)
        self.num_clients = num_clients
        self.left_out: dict[int, str] = {}
        self._client_of: dict[int, int] = {}

    def call_roll(self) -> dict[int, int]:
        """Return Flower's id of every node that is there, by client number. Nodes not seen before are asked."""
        there = list(self.inner.get_node_ids())
        self._ask([node for node in there if node not in self._client_of and node not in self.left_out])
        nodes: dict[int, int] = {}
        for node in there:
            if node in self.left_out:
                continue
            client = self._client_of[node]
            if client in nodes:
                self._leave_out(node, f"it holds partition {client}, and so does node {nodes[client]}")
            else:
                nodes[client] = node
        return nodes

    def get_node_ids(self) -> Iterable[int]:
        return sorted(map(flower.node_of, self.call_roll()))

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        nodes = self.call_roll()
        sent: dict[str, Message] = {}
        passed: list[Message] = []
        for message in flower.number(messages):
            client = flower.client_of(message.metadata.dst_node_id)
            if client not in nodes:
                yield flower.failure(message, flower.FAILED_WORKER, "the client's node has left")
                continue
            passed.append(twin(message, nodes[client]))
            flower.rename(passed[-1], message.metadata.message_id)
            sent[message.metadata.message_id] = message
        for reply in super().stream(passed, timeout=timeout):
            message = sent[reply.metadata.reply_to_message_id]
            if reply.has_error():
                yield flower.failure(message, reply.error.code, reply.error.reason or "no reason")
            else:
                yield flower.reply(reply.content, message)

    def _ask(self, nodes: list[int]) -> None:
        questions = [Message(RecordDict(), node, ROLL_CALL) for node in nodes]
        for question, reply in zip(questions, Ordered(self.inner).stream(questions, timeout=ROLL_CALL_S), strict=True):
            node = question.metadata.dst_node_id
            if reply.has_error():
                self._leave_out(node, f"it did not say which partition it holds: {reply.error.reason}")
                continue
            said = records.config_record(reply.content, records.CONFIG)
            client, of = said.get("partition-id"), said.get("num-partitions", self.num_clients)
            if of != self.num_clients:
                self._leave_out(node, f"it counts {of!r} partitions, and the scenario has {self.num_clients} clients")
            elif not isinstance(client, int) or not 0 <= client < self.num_clients:
                self._leave_out(node, f"its 'partition-id' is {client!r}, not a client's number below {of}")
            else:
                self._client_of[node] = client

    def _leave_out(self, node: int, reason: str) -> None:
        log.warning("node %d gets no messages: %s", node, reason)
        self.left_out[node] = reason


def twin(message: Message, node_id: int) -> Message:
    """Return a message with the same content to a node, without an id."""
    said = message.metadata
    return Message(message.content, node_id, said.message_type, ttl=said.ttl, group_id=said.group_id)
