"""Clients on other machines, over the project's own gRPC link (``protos/trellis/v1/link.proto``, docs/wire.md)."""

from __future__ import annotations

import itertools
import json
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from trellis import flower, records
from trellis.errors import DataError, GridError
from trellis.grids._grpc_link import Link, Settings
from trellis.grids._grpc_tasks import Answer, Open, references, task_id
from trellis.grids.base import ClientGrid
from trellis.wire import content as wire
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.payload import encode
from trellis.wire.shortening import restore

__all__ = ["GrpcGrid", "Settings", "from_wire", "to_wire"]


class GrpcGrid(ClientGrid):
    """Send Flower messages to nodes that joined over gRPC.

    A client is a number below ``num_clients``, as on the other grids; which node is which client is settled when the
    node joins. Its private state stays with it.

    A strategy samples from the clients whose node is connected or was within ``settings.leave_after_s``. Where these
    are fewer than it samples, absent ones make up the number: a message to them fails at once, and the quorum decides
    whether the round counts. Flower's strategies would wait for ever instead.

    Args:
        num_clients: of the federation.
        settings: of the link.
        run: name of the run; nodes keep their state by it.
        min_clients: waits for this many before a message is made; by default all.
        encoding: of payloads to the nodes, ``pb.ENCODING_NONE`` or ``pb.ENCODING_ZSTD``.
        shortening: what nodes do to their updates, see ``trellis.wire.shortening``.
        counted: called with the name of an event and its labels, for metrics.

    Attributes:
        link: the service.
        setup: what tasks say of the cell they belong to; see ``describe``.

    Raises:
        GridError: the address cannot be listened on.
    """

    in_process = False
    replays = False

    def __init__(
        self,
        num_clients: int,
        settings: Settings | None = None,
        *,
        run: str = "run",
        min_clients: int | None = None,
        encoding: pb.Encoding = pb.ENCODING_NONE,
        shortening: pb.Shortening = pb.SHORTENING_NONE,
        counted: Callable[[str, Mapping[str, str]], None] = lambda *_: None,
    ) -> None:
        super().__init__(num_clients)
        self.min_clients = num_clients if min_clients is None else min_clients
        self.encoding, self.shortening = encoding, shortening
        self.cell, self._needed = "", num_clients
        self.setup, self._run_name = pb.Payload(), run
        self.link = Link(settings or Settings(), num_clients, run, counted)

    @property
    def workers(self) -> int:
        return max(len(self.link.connected()), 1)

    def describe(self, cell: str, scenario: Mapping[str, Any], seed: int) -> None:
        """Say what the following messages belong to: nodes build their trainer, model and data from it."""
        text = json.dumps({"cell": cell, "scenario": scenario, "seed": seed}, sort_keys=True)
        payload, data = encode(text.encode(), pb.ENCODING_ZSTD)
        self.cell, self.setup = cell, payload
        cohorts = scenario["rounds"]["clients_per_round"], scenario["evaluation"]["clients"]
        self._needed = max(cohort or self.num_clients for cohort in cohorts)
        self.link.call(self.link.setups.__setitem__, payload.digest, data)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of the clients that are there, once they are ``min_clients``, and absent ones if need be.

        Raises:
            GridError: no node was connected for ``settings.give_up_after_s``.
        """
        while True:
            there = self.link.connected()
            if len(there) >= self.min_clients:
                absent = (client for client in range(self.num_clients) if client not in there)
                there += itertools.islice(absent, max(self._needed - len(there), 0))
                return [flower.node_of(client) for client in sorted(there)]
            self._give_up_or(there)
            with self.link.changed:
                self.link.changed.wait(0.2)

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        answers: queue.SimpleQueue[tuple[str, Answer]] = queue.SimpleQueue()
        sent: dict[str, tuple[Message, wire.Content]] = {}
        tasks: list[Open] = []
        encoded = _Encoder(self.encoding)
        for message in flower.number(messages):
            task, content = self._task(message, encoded)
            number, name = len(sent), task.id
            while name in sent:  # the same question twice in one go: both are to be answered
                number += 1
                name = task_id(task.id, str(number))
            task.id = name
            client = flower.client_of(message.metadata.dst_node_id)
            sent[name] = message, content
            tasks.append(Open(task, client, deadline, _putting(answers, name)))
        payloads = {digest: encoded.data[digest] for each in tasks for digest in references(each.task)}
        self.link.call(self.link.open, tasks, payloads)
        del payloads, encoded
        clients = {each.task.id: each.client for each in tasks}
        try:
            while sent:
                left = None if deadline is None else deadline - time.monotonic()
                try:
                    name, answer = answers.get(timeout=max(0.0, 1.0 if left is None else min(left, 1.0)))
                except queue.Empty:
                    if left is not None and left <= 0:
                        self._close(
                            sent, clients, flower.FAILED_DEADLINE, f"no reply before the deadline of {timeout:g} s"
                        )
                    else:
                        self._give_up_or(self.link.connected())
                    continue
                message, content = sent.pop(name)
                yield self._reply(message, content, answer)
        finally:
            self._close(sent, clients, flower.FAILED_DEADLINE, "no reply is wanted any more")

    def close(self) -> None:
        """End the link for good: nodes are told that the run is over."""
        self.link.close()

    def _task(self, message: Message, encoded: _Encoder) -> tuple[pb.Task, wire.Content]:
        content: wire.Content = {}
        task = pb.Task(kind=message.metadata.message_type, cell=self.cell, setup=self.setup, shortening=self.shortening)
        for name, record in message.content.items():
            payload, content[name] = encoded(record)
            task.records.add(name=name, payload=payload)
        digests = [f"{record.name}={record.payload.digest}" for record in task.records]
        client = str(flower.client_of(message.metadata.dst_node_id))
        task.id = task_id(self._run_name, self.cell, self.setup.digest, task.kind, client, *digests)
        return task, content

    def _reply(self, message: Message, sent: wire.Content, answer: Answer) -> Message:
        try:
            if answer.buffer is None:
                return flower.failure(message, answer.code, answer.reason)
            return flower.reply(from_wire(restore(wire.unpack(answer.buffer), sent)), message)
        except (DataError, ValueError, TypeError) as error:
            return flower.failure(message, flower.FAILED_CLIENT, f"its answer cannot be read: {error}")
        finally:
            answer.release()

    def _close(self, sent: Mapping[str, Any], clients: Mapping[str, int], code: int, reason: str) -> None:
        for name in list(sent):
            self.link.call(self.link.close_task, clients[name], name, Answer(code=code, reason=reason))

    def _give_up_or(self, there: list[int]) -> None:
        """Go on, or end the run where nobody has been there for too long."""
        limit, since = self.link.settings.give_up_after_s, self.link.none_since
        if since is not None and time.monotonic() - since > limit:
            raise GridError(
                "no-clients",
                f"no node has been connected for {limit:g} s; {len(there)} of {self.num_clients} clients are there."
                " The run can be resumed once they are back",
            )

    @property
    def num_clients(self) -> int:
        """Clients of the federation."""
        return len(self._nodes)


def _putting(answers: queue.SimpleQueue[tuple[str, Answer]], name: str) -> Callable[[Answer], None]:
    return lambda answer: answers.put((name, answer))


class _Encoder:
    """Encodes each record once, however many messages share it."""

    def __init__(self, encoding: pb.Encoding) -> None:
        self.encoding = encoding
        self.data: dict[str, bytes] = {}
        self._done: dict[int, tuple[Any, pb.Payload, wire.Record]] = {}

    def __call__(self, record: Any) -> tuple[pb.Payload, wire.Record]:
        if id(record) not in self._done:
            plain = record_to_wire(record)
            payload, data = encode(wire.pack({"record": plain}), self.encoding)
            if not payload.inline:
                self.data[payload.digest] = data
            self._done[id(record)] = record, payload, plain  # the record is held, so that its id stays its own
        _, payload, plain = self._done[id(record)]
        return payload, plain


def record_to_wire(record: Any) -> wire.Record:
    """Return one of Flower's records as the wire knows it. Arrays are shared, not copied."""
    if isinstance(record, ArrayRecord):
        return wire.Record("arrays", {name: records.view(array) for name, array in record.items()})
    kind: wire.Kind = "metrics" if isinstance(record, MetricRecord) else "config"
    return wire.Record(kind, dict(record))


def to_wire(content: RecordDict) -> wire.Content:
    """Return a message's content as the wire knows it."""
    return {name: record_to_wire(record) for name, record in content.items()}


def from_wire(content: wire.Content) -> RecordDict:
    """Return the wire's content as Flower's records. Arrays stay views where the buffer lies.

    Raises:
        TypeError, ValueError: a value is of a type that Flower's records do not take.
    """
    result = RecordDict()
    for name, record in content.items():
        if record.kind == "arrays":
            result[name] = records.array_record(record.values)
        else:
            result[name] = (
                MetricRecord(dict(record.values)) if record.kind == "metrics" else ConfigRecord(dict(record.values))
            )
    return result
