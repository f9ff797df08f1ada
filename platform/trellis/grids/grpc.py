"""Clients on other machines, over the project's own gRPC link (``protos/trellis/v1/link.proto``, docs/wire.md)."""

from __future__ import annotations

import itertools
import json
import logging
import math
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

__all__ = ["GrpcGrid", "Link", "Settings", "from_wire", "to_wire"]

log = logging.getLogger("trellis.link")


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
        min_clients: waits for this many before a message is made. By default for all at first, and later, where some
            may have been lost for good, for as many as the quorum needs.
        encoding: of payloads to the nodes, ``pb.ENCODING_NONE`` or ``pb.ENCODING_ZSTD``.
        shortening: what nodes do to their updates, see ``trellis.wire.shortening``.
        counted: called with the name of an event and its labels, for metrics.

    Attributes:
        min_clients: for how many the first message waits.
        link: the service.
        setup: what tasks say of the cell they belong to; see ``describe``.

    Raises:
        GridError: the address cannot be listened on, or ``min_clients`` are more than there are.
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
        if min_clients is not None and not 1 <= min_clients <= num_clients:
            raise GridError("link-settings", f"min-clients is {min_clients}; it has to be from 1 to {num_clients}")
        self.min_clients, self._all = num_clients if min_clients is None else min_clients, min_clients is None
        self.encoding, self.shortening = encoding, shortening
        self.cell, self._needed, self._quorum, self._begun = "", num_clients, num_clients, False
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
        self._quorum = max(math.ceil(scenario["rounds"].get("quorum", 1.0) * (cohorts[0] or self.num_clients)), 1)
        self.link.call(self.link.setups.__setitem__, payload.digest, data)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of the clients that are there, once they are enough, and absent ones if need be.

        Raises:
            GridError: no node was connected for ``settings.give_up_after_s``, or too few, and no further one came.
        """
        needed = self._quorum if self._begun and self._all else self.min_clients
        before, since = -1, time.monotonic()
        while len(there := self.link.connected()) < needed:
            if len(there) != before:
                if self._begun:
                    said = {"run": self._run_name, "cell": self.cell, "there": len(there), "needed": needed}
                    log.warning("waiting for clients that were lost", extra=said)
                before, since = len(there), time.monotonic()
            self._give_up_or(there)
            if time.monotonic() - since > self.link.settings.give_up_after_s:
                raise GridError(
                    "too-few-clients",
                    f"{len(there)} of {needed} clients are there, and none came for"
                    f" {self.link.settings.give_up_after_s:g} s. The run can be resumed once they are back",
                )
            with self.link.changed:
                self.link.changed.wait(0.2)
        absent = (client for client in range(self.num_clients) if client not in there)
        there += itertools.islice(absent, max(self._needed - len(there), 0))
        return [flower.node_of(client) for client in sorted(there)]

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        answers: queue.SimpleQueue[tuple[str, Answer]] = queue.SimpleQueue()
        sent, tasks = self._open(messages, deadline, answers)
        clients = {each.task.id: each.client for each in tasks}
        del tasks
        self._begun, late = True, False
        try:
            while sent:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0 and not late:
                    late = True  # what is in the queue came in time
                    reason = f"no reply before the deadline of {timeout:g} s"
                    self._close(sent, clients, Answer(code=flower.FAILED_DEADLINE, reason=reason), answers)
                try:
                    name, answer = answers.get(timeout=1.0 if late or left is None else max(min(left, 1.0), 0.0))
                except queue.Empty:
                    if not late:
                        self._give_up_or(self.link.connected())
                    continue
                if name in sent:
                    message, content = sent.pop(name)
                    yield self._reply(message, content, answer)
                else:
                    answer.release()
        finally:
            unwanted = Answer(code=flower.FAILED_DEADLINE, reason="no reply is wanted any more")
            self._close(sent, clients, unwanted, answers)
            while not answers.empty():
                answers.get()[1].release()

    def _open(
        self,
        messages: Iterable[Message],
        deadline: float | None,
        answers: queue.SimpleQueue[tuple[str, Answer]],
    ) -> tuple[dict[str, tuple[Message, wire.Content]], list[Open]]:
        """Give the nodes their tasks; return what was sent by the tasks' ids, and the tasks."""
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
            tasks.append(Open(task, client, deadline, _putting(answers, name), _round_of(message)))
        payloads = {digest: encoded.data[digest] for each in tasks for digest in references(each.task)}
        self.link.call(self.link.open, tasks, payloads)
        return sent, tasks

    def remembered(self) -> dict[str, Any]:
        """Return the latest answers of each client that count: with them a node knows its state after a restart."""
        kept: dict[str, Any] = self.link.call(self.link.answered.remembered, self.cell)
        return kept

    def recall(self, kept: Mapping[str, Any] | None) -> None:
        self.link.call(self.link.answered.recall, self.cell, kept)

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

    def _close(
        self,
        sent: Iterable[str],
        clients: Mapping[str, int],
        answer: Answer,
        answers: queue.SimpleQueue[tuple[str, Answer]],
    ) -> None:
        """End tasks without their nodes. One that is nobody's any more gets its answer here."""
        for name in list(sent):
            if not self.link.call(self.link.close_task, clients[name], name, answer):
                answers.put((name, answer))

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


def _round_of(message: Message) -> int | None:
    for record in message.content.config_records.values():
        number = record.get("server-round")
        if isinstance(number, int):
            return number
    return None


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
