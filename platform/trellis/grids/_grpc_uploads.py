"""Room for answers on their way in: what has come of all together is bounded, and none can hold up the others.

Room is taken for bytes that came, not for what a node says is to come. Where uploads under way fill it, the first that
waits may go on beyond it, so that there is always one that ends, as long as it does go on. Where whole answers lie in
it, all wait until those are read.
"""

from __future__ import annotations

import asyncio
import time

STALLED_S = 60.0
"""A call of which not a byte moves for so long is given up. A node repeats it."""

FIRST_S = 30.0
"""For the first message of an answer: until then it is not known who calls."""

SLOWEST, GRACE_S = 50_000, 30.0
"""Bytes a second that an upload has to bring, after a moment, where others wait for it."""


class TooSlowError(Exception):
    """An upload that others wait for does not go on."""


class Room:
    """Bytes that may lie here at once. Belongs to one event loop.

    Args:
        size: how many; one upload may go beyond.

    Attributes:
        used: bytes that lie here: of answers that are under way, and of those that are not read yet.
        unread: the latter of them.
        highest: the most that ever lay here.
    """

    def __init__(self, size: int) -> None:
        self.size, self.used, self.unread, self.highest = size, 0, 0, 0
        self._first: object | None = None
        self._since, self._brought = 0.0, 0
        self._change = asyncio.Condition()

    async def take(self, upload: object, count: int) -> None:
        """Take room for bytes that came, once there is some.

        Raises:
            TooSlowError: others wait for this upload, and it hardly moves.
        """
        if self.used and self.used + count > self.size and self._first is not upload:
            async with self._change:
                await self._change.wait_for(
                    lambda: self.used + count <= self.size or (self._first is None and not self.unread)
                )
                if self.used + count > self.size:
                    self._first, self._since, self._brought = upload, time.monotonic(), 0
        if self._first is upload:
            self._brought += count
            seconds = time.monotonic() - self._since
            if seconds > GRACE_S and self._brought < SLOWEST * seconds:
                raise TooSlowError(f"{self._brought} bytes in {seconds:.0f} s, and others wait for it")
        self.grow(count)

    def grow(self, count: int) -> None:
        """Note bytes that are there already."""
        self.used += count
        self.highest = max(self.highest, self.used)

    async def end(self, upload: object) -> None:
        """Let the next one go first."""
        if self._first is upload:
            async with self._change:
                self._first = None
                self._change.notify_all()

    def keep(self, count: int) -> None:
        """Note that an answer is whole: its bytes lie here until it is read."""
        self.unread += count

    async def read(self, count: int) -> None:
        """Give the room of a whole answer back."""
        self.unread -= count
        await self.free(count)

    async def free(self, count: int) -> None:
        """Give room back."""
        async with self._change:
            self.used -= count
            self._change.notify_all()
