"""One batch at a time, in the order of arrival, and not too many waiting."""

from __future__ import annotations

from collections import deque
from threading import Event, Lock
from types import TracebackType
from typing import Self


class QueueFullError(Exception):
    """As many are waiting as may wait."""


class Turnstile:
    """A first-in first-out lock with a bounded queue. A plain lock wakes whoever it likes.

    Args:
        most: tickets that may be out at once, the one whose turn it is included.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._out: deque[Ticket] = deque()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._out)

    def ticket(self, *, always: bool = False) -> Ticket:
        """Take a place at the end of the queue.

        Args:
            always: even if the queue is full; for the server's own work, which is rare.

        Raises:
            QueueFullError: it is.
        """
        with self._lock:
            if len(self._out) >= self.most and not always:
                raise QueueFullError
            ticket = Ticket(self)
            self._out.append(ticket)
            if self._out[0] is ticket:
                ticket.called.set()
        return ticket

    def take_back(self, ticket: Ticket, *, unless_called: bool = False) -> None:
        """Take a ticket out of the queue, once or more often; the next one is called if it was its turn."""
        with self._lock:
            if ticket not in self._out or (unless_called and ticket.called.is_set()):
                return
            self._out.remove(ticket)
            ticket.given_up = not ticket.called.is_set()
            ticket.called.set()  # whoever waits on it shall not wait for ever
            if self._out:
                self._out[0].called.set()


class Ticket:
    """A place in the queue. As a context manager it waits for its turn, and ends it."""

    def __init__(self, turnstile: Turnstile) -> None:
        self.turnstile = turnstile
        self.called = Event()
        self.given_up = False

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the turn; return whether it came in time and was not given up meanwhile."""
        return self.called.wait(seconds) and not self.given_up

    def give_up(self) -> None:
        """Leave the queue if the turn has not come yet; whoever waits on the ticket wakes."""
        self.turnstile.take_back(self, unless_called=True)

    def end(self) -> None:
        """End the turn, or leave the queue."""
        self.turnstile.take_back(self)

    def __enter__(self) -> Self:
        self.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
