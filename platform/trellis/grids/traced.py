"""The tracing layer: bytes, times and failures of every message, on any grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from trellis import flower
from trellis.grids.base import Layer
from trellis.records import TIMING, config_record, content_bytes, metric_records


@dataclass(frozen=True)
class Failure:
    """A client that gave no usable reply, in which phase, and why."""

    client: int
    phase: str
    reason: str


@dataclass(frozen=True)
class ReplyTrace:
    """One reply as it passed.

    Attributes:
        client: the client's number.
        phase: ``train``, ``evaluate`` or ``query``.
        ok: whether it carries content; a refused reply does not.
        reason: the error's reason, one line; None if ok.
        metrics: the numbers it reports; lists are left out.
        seconds: the client's own time, None if it did not say.
        cpu_seconds: likewise of its process's CPU.
        bytes_up: payload in bytes; 0 of what was not admitted, whose content is gone.
        message_id: id of the message it answers.
    """

    client: int
    phase: str
    ok: bool
    reason: str | None
    metrics: dict[str, int | float]
    seconds: float | None
    cpu_seconds: float | None
    bytes_up: int
    message_id: str


@dataclass(frozen=True)
class Traffic:
    """What passed since the last ``take``. Bytes are payload, without the transport's own overhead."""

    bytes_down: int = 0
    bytes_up: int = 0
    messages: int = 0
    failures: list[Failure] = field(default_factory=list)


class Traced(Layer):
    """Count what passes and yield it unchanged.

    Args:
        inner: the grid to watch.
        on_reply: called with each reply's trace, before the reply is yielded.

    Attributes:
        bytes_down: payload sent; what many clients share counts once for each of them, as each receives it.
        bytes_up: payload that came back.
        messages: messages sent.
        failures: replies that were errors.
    """

    def __init__(self, inner: Grid, on_reply: Callable[[ReplyTrace], None] | None = None) -> None:
        super().__init__(inner)
        self.on_reply = on_reply
        self.bytes_down = 0
        self.bytes_up = 0
        self.messages = 0
        self.failures: list[Failure] = []

    def take(self) -> Traffic:
        """Return the counts and start anew from zero."""
        traffic = Traffic(self.bytes_down, self.bytes_up, self.messages, self.failures)
        self.bytes_down, self.bytes_up, self.messages, self.failures = 0, 0, 0, []
        return traffic

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        sent = list(messages)
        self._count_down(sent)
        for reply in super().stream(sent, timeout=timeout):
            self._count_up(reply)
            yield reply
            del reply  # or it would be held while the next one is made

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        self._count_down(sent)
        return super().push_messages(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            self._count_up(reply)
        return replies

    def _count_down(self, messages: list[Message]) -> None:
        sizes: dict[int, int] = {}
        for message in messages:
            content = message.content
            if id(content) not in sizes:
                sizes[id(content)] = content_bytes(content)
            self.bytes_down += sizes[id(content)]
        self.messages += len(messages)

    def _count_up(self, reply: Message) -> None:
        trace = traced(reply)
        self.bytes_up += trace.bytes_up
        if not trace.ok:
            self.failures.append(Failure(trace.client, trace.phase, trace.reason or ""))
        if self.on_reply:
            self.on_reply(trace)


def traced(reply: Message) -> ReplyTrace:
    """Describe one reply."""
    said, ok = reply.metadata, reply.has_content()
    content = reply.content if ok else RecordDict()
    return ReplyTrace(
        client=flower.client_of(said.src_node_id),
        phase=said.message_type.partition(".")[0],
        ok=ok,
        reason=None if ok else _reason(reply),
        metrics=_numbers(content),
        seconds=_seconds(content, "seconds"),
        cpu_seconds=_seconds(content, "cpu_seconds"),
        bytes_up=content_bytes(content),
        message_id=said.reply_to_message_id,
    )


def _reason(reply: Message) -> str:
    if not reply.has_error():
        return "the reply is empty"
    return " ".join((reply.error.reason or "").split()) or f"error {reply.error.code}"


def _numbers(content: RecordDict) -> dict[str, int | float]:
    found = metric_records(content).values()
    return {name: value for record in found for name, value in record.items() if isinstance(value, int | float)}


def _seconds(content: RecordDict, key: str) -> float | None:
    """Return a time the client says it took, if it is one: the record is the client's word."""
    value = config_record(content, TIMING).get(key)
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    return float(value)
