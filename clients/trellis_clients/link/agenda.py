"""The tasks that the server gave a node: in which order, which of them are still of use, and what ends with them.

Two threads meet here. The one that listens to the stream says what comes and what is cancelled; the one that works
takes a task at a time and asks between its steps whether to go on. Calls under way for a task that is of no use any
more are ended, so that nothing waits for a server that has nothing to say about it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trellis.wire.generated import link_pb2 as pb

HAND_IN_S = 5.0
"""A node that was told to stop goes on trying to hand in an answer for this long: it has the answer on its disk."""


class EndedError(Exception):
    """The server said goodbye for good, or the node was told to stop. ``str`` is the server's reason, "" for a stop."""


class TaskCancelledError(EndedError):
    """The server has no use for the answer to one task any more. ``str`` is the task."""


@dataclass
class _Known:
    """A task from its arrival until the worker is done with it.

    Attributes:
        place: the welcome under which it came: which run, and which client this node is.
        cancelled: the server has no use for it.
        left: the worker has heard of that and is on its way out of it.
        answering: its answer may be with the server already.
        again: the task, where it came once more after it was left.
    """

    place: pb.JoinResponse
    cancelled: bool = False
    left: bool = False
    answering: bool = False
    again: pb.Task | None = None


class Agenda:
    """Tasks in the order of their arrival, each once, from any number of streams."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._queue: deque[pb.Task] = deque()
        self._known: dict[str, _Known] = {}
        self._calls: dict[int, tuple[str, Any]] = {}
        self._sent: set[str] = set()
        self._end: BaseException | None = None
        self._finishing = False
        self._answering = 0
        self._timer: threading.Timer | None = None

    # -- what the stream says ---------------------------------------------------------------------------

    def new_stream(self) -> None:
        """A new stream begins: all tasks that are still open come again."""
        with self._change:
            self._sent.clear()

    def receive(self, task: pb.Task, place: pb.JoinResponse) -> None:
        """Take in a task. One that is under way goes on, also if it was cancelled and the worker does not know yet."""
        with self._change:
            self._sent.add(task.id)
            known = self._known.get(task.id)
            if known is None:
                self._known[task.id] = _Known(place)
                self._queue.append(task)
                self._change.notify_all()
            elif known.left:
                known.again, known.place = task, place
            else:
                known.cancelled = False

    def cancel(self, task: str) -> None:
        """The server has no use for a task. One that is not known here is none of this node's concern."""
        with self._change:
            if (known := self._known.get(task)) is not None:
                known.cancelled, known.again = True, None
                self._end_calls(task)

    def complete(self) -> None:
        """All open tasks were sent on this stream: one that was not came to its end while nobody listened.

        But for those whose answer was on its way: it may be that it arrived, and the server's word on it did not. What
        became of it is asked for by sending it again.
        """
        with self._change:
            for task, known in self._known.items():
                if task not in self._sent and not known.answering and not known.cancelled:
                    self.cancel(task)

    def end(self, why: BaseException) -> bool:
        """There will be no more tasks, and nothing is left to do for those that are here. The first reason stays.

        Returns:
            Whether this was the first.
        """
        with self._change:
            first = self._end is None
            if first:
                self._end = why
                self._end_calls(None)
            return first

    def finish(self) -> None:
        """The task under way is the last, and an answer that cannot be handed in is not waited for."""
        with self._change:
            self._finishing = True
            self._limit()
            self._change.notify_all()

    def _end_calls(self, task: str | None) -> None:
        for owner, call in list(self._calls.values()):
            if task in (None, owner):
                call.cancel()
        self._change.notify_all()

    # -- what the worker asks ---------------------------------------------------------------------------

    def tasks(self) -> Iterator[pb.Task]:
        """Yield tasks until ``finish``, and leave out those that were cancelled before their turn.

        Raises:
            EndedError: there will be no more.
            GridError: the server is lost for good.
        """
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._finishing or self._end is not None)
                self.check()
                if self._finishing:
                    return
                task = self._queue.popleft()
                if self._known[task.id].cancelled:
                    del self._known[task.id]
                    continue
            yield task

    def done(self, task: str) -> None:
        """Say that a task is over on this side: should the server send it again, it is to be answered again."""
        with self._change:
            known = self._known.pop(task, None)
            if known is not None and known.again is not None:
                self._known[task] = _Known(known.place)
                self._queue.append(known.again)
                self._change.notify_all()
            else:
                self._sent.discard(task)

    def place(self, task: str) -> pb.JoinResponse:
        """Return the welcome under which a task came. The node may be another client of another run by now."""
        with self._change:
            return self._known[task].place

    def check(self) -> None:
        """Return if the node is to go on.

        Raises:
            EndedError: the run is over, or the node was told to stop.
            GridError: the server is lost for good.
        """
        with self._change:
            if self._end is not None:
                raise self._end

    def go_on(self, task: str) -> None:
        """Return if work on a task is still of use.

        Raises:
            TaskCancelledError: nobody waits for it any more.
            EndedError: the run is over, or the node was told to stop.
            GridError: the server is lost for good.
        """
        with self._change:
            self.check()
            known = self._known.get(task)
            if known is not None and known.cancelled:
                known.left = True
                raise TaskCancelledError(task)

    def pause(self, task: str, seconds: float) -> None:
        """Wait, unless the task, or the node's work, ends before."""
        with self._change:
            known = self._known.get(task)
            self._change.wait_for(
                lambda: self._end is not None or (known is not None and known.cancelled), timeout=seconds
            )

    @contextmanager
    def under_way(self, task: str, begin: Callable[[], Any]) -> Iterator[Any]:
        """Begin a call for a task, which is ended with the task.

        Args:
            task: whose call it is.
            begin: returns the call, something with ``cancel``.

        Raises:
            EndedError, GridError: as ``go_on``.
        """
        with self._change:
            self.go_on(task)
            call = begin()
            self._calls[id(call)] = task, call
        try:
            yield call
        finally:
            with self._change:
                del self._calls[id(call)]
            call.cancel()

    @contextmanager
    def answering(self, task: str) -> Iterator[None]:
        """Hand in an answer, which may be with the server from now on. Once ``finish`` was called, not for long."""
        with self._change:
            if (known := self._known.get(task)) is not None:
                known.answering = True
            self._answering += 1
            self._limit()
        try:
            yield
        finally:
            with self._change:
                self._answering -= 1
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None

    def _limit(self) -> None:
        if self._finishing and self._answering and self._timer is None:
            self._timer = threading.Timer(HAND_IN_S, self.end, (EndedError(""),))
            self._timer.daemon = True
            self._timer.start()
