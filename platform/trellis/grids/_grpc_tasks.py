"""What the server end of the link keeps: nodes, their open tasks, what was answered, and the payloads referred to."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trellis.wire.generated import link_pb2 as pb

FAILED_CLIENT, FAILED_WORKER = 2, 8
"""Codes of a failure, as in ``trellis.flower``, which the link can do without."""

REMEMBERED = 64
"""Ids of answered tasks that are kept for each client, so that an answer sent twice is known for what it is. A node
has few answers that it does not know to be accepted: it works on one task at a time."""

KEPT = 2
"""Ids for each client that go into a checkpoint: the latest tells the node which of its states counts, and a node that
died before it noted that has at most one such answer, as it settles each before it starts the next."""


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
        round: whose it is, as far as is known; for logs.
        upload: the call that is receiving its answer; it ends with the task.
    """

    task: pb.Task
    client: int
    deadline: float | None
    close: Callable[[Answer], None]
    round: int | None = None
    upload: asyncio.Task[Any] | None = None

    def stop_upload(self) -> None:
        """End the call that is receiving the answer, if there is one: nobody waits for it any more."""
        if self.upload is not None and self.upload is not asyncio.current_task():
            self.upload.cancel()
        self.upload = None

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
        credential: digest of what it showed; None where nobody is asked.
        stream: number of the latest Work stream; earlier ones end.
        gone_since: monotonic time since which no stream is open; None while one is.
        wake: set when there is something new for its stream.
        fetches: payloads that it is being sent now.
    """

    name: str
    instance: str
    client: int
    session: str
    kind: int
    credential: str | None = None
    stream: int = 0
    gone_since: float | None = field(default_factory=time.monotonic)
    tasks: dict[str, Open] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    fetches: int = 0

    @property
    def connected(self) -> bool:
        return self.gone_since is None

    def absent_for(self, seconds: float) -> bool:
        """Return whether no stream of it has been open for that long."""
        return self.gone_since is not None and time.monotonic() - self.gone_since >= seconds


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


class Answered:
    """The tasks that were answered lately: what became of them, and which of each client's counts in which cell.

    Only what counts goes into a checkpoint. Where nothing is known of a cell (a checkpoint that says nothing), nothing
    is said of it to nodes either.
    """

    def __init__(self) -> None:
        self._verdicts: defaultdict[int, OrderedDict[str, int]] = defaultdict(OrderedDict)
        self._counted: dict[str, dict[int, list[str]]] = {}

    def verdict(self, client: int, task: str) -> int | None:
        """Return what an answer of this client was told, None where there was none lately."""
        return self._verdicts[client].get(task) if client in self._verdicts else None

    def add(self, client: int, cell: str, task: str, verdict: int, counts: bool) -> None:
        """Remember an answer; whether it counts, as a failure does not."""
        known = self._verdicts[client]
        known[task] = verdict
        known.move_to_end(task)
        while len(known) > REMEMBERED:
            known.popitem(last=False)
        if counts and cell in self._counted:
            counted = self._counted[cell].setdefault(client, [])
            counted[:] = [*(each for each in counted if each != task), task][-KEPT:]

    def after(self, client: int, cell: str) -> str | None:
        """Return the latest answer of a client that counts, "" where none does yet, None where it is not known."""
        if cell not in self._counted:
            return None
        counted = self._counted[cell].get(client)
        return counted[-1] if counted else ""

    def remembered(self, cell: str) -> dict[str, list[str]]:
        """Return what a checkpoint keeps of a cell, as plain JSON data."""
        return {str(client): list(tasks) for client, tasks in self._counted.get(cell, {}).items()}

    def recall(self, cell: str, kept: Mapping[str, list[str]] | None) -> None:
        """Take back what ``remembered`` returned. None forgets the cell: its checkpoint says nothing."""
        if kept is None:
            self._counted.pop(cell, None)
            return
        self._counted[cell] = {int(client): list(tasks) for client, tasks in kept.items()}
        for client, tasks in self._counted[cell].items():
            for task in tasks:
                self._verdicts[client].setdefault(task, pb.VERDICT_ACCEPTED)


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
