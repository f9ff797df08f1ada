"""What the server end of the link keeps: nodes, their open tasks, and the payloads that tasks refer to."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trellis.wire.generated import link_pb2 as pb

REMEMBERED = 64
"""Ids of answered tasks that are kept for each client, so that an answer sent twice is known for what it is. A node
has few answers that it does not know to be accepted: it works on one task at a time."""


@dataclass
class Answer:
    """How a task ended: the answer's bytes, or why there is none.

    Attributes:
        buffer: all records of the answer, decoded but not read yet; None for a failure.
        code, reason: of a failure.
        release: to be called once the buffer is not needed any more.
    """

    buffer: Any = None
    code: int = 0
    reason: str = ""
    release: Callable[[], None] = lambda: None


@dataclass
class Open:
    """A task that waits for its answer.

    Attributes:
        task: as it goes on the wire, but for the time left.
        client: whose it is.
        deadline: by the monotonic clock; None for none.
        close: called once, with the answer. It may be called from the link's thread only.
    """

    task: pb.Task
    client: int
    deadline: float | None
    close: Callable[[Answer], None]

    def on_wire(self) -> pb.Task:
        """Return the task with the time that is left now."""
        task = pb.Task()
        task.CopyFrom(self.task)
        left = float("inf") if self.deadline is None else self.deadline - time.monotonic()
        task.seconds_left = max(left, 0.0)
        return task


@dataclass
class Node:
    """A node that joined, connected or not.

    Attributes:
        name: authenticated, or as it says where nobody is authenticated.
        client: the client of the federation that it is.
        session: the latest; calls with another are refused.
        stream: number of the latest Work stream; earlier ones end.
        gone_since: monotonic time since which no stream is open; None while one is.
        wake: set when there is something new for its stream.
    """

    name: str
    instance: str
    client: int
    session: str
    kind: int
    stream: int = 0
    gone_since: float | None = field(default_factory=time.monotonic)
    tasks: dict[str, Open] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def connected(self) -> bool:
        return self.gone_since is None


class Payloads:
    """Encoded payloads by digest, each once, as long as a task refers to it."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[bytes, int]] = {}

    def get(self, digest: str) -> bytes | None:
        held = self._held.get(digest)
        return held[0] if held else None

    def hold(self, digest: str, data: bytes) -> None:
        """Keep a payload once more."""
        kept, count = self._held.get(digest, (data, 0))
        self._held[digest] = kept, count + 1

    def drop(self, digest: str) -> None:
        """Undo one ``hold``."""
        data, count = self._held[digest]
        if count > 1:
            self._held[digest] = data, count - 1
        else:
            del self._held[digest]

    @property
    def num_bytes(self) -> int:
        return sum(len(data) for data, _ in self._held.values())


class Recent:
    """The latest ids of something, as many as are worth remembering."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()
        self._most = most

    def add(self, name: str) -> None:
        self._ids[name] = None
        while len(self._ids) > self._most:
            self._ids.popitem(last=False)

    def __contains__(self, name: str) -> bool:
        return name in self._ids


def task_id(*parts: str | bytes) -> str:
    """Return the id of a task: the same for the same question, so that it is known again after a restart."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:32]


def references(task: pb.Task) -> list[str]:
    """Return the digests of the payloads that a task does not carry itself, but for its setup."""
    return [record.payload.digest for record in task.records if not record.payload.inline]
