"""The messages of one stream of ``RayGrid``: which wait, which are open, and the content they share."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message

from trellis import flower

_keys = itertools.count(1)


@dataclass(frozen=True)
class Turn:
    """A message on its way to the client it is for.

    Attributes:
        position: its place in the cohort.
        alone: it was under way together with others when their worker died. It is run with none beside it
            from now on, to see whether it was the cause.
    """

    position: int
    message: Message
    alone: bool = False

    @property
    def client(self) -> int:
        return flower.client_of(self.message.metadata.dst_node_id)


class Cohort:
    """The turns of one stream.

    Attributes:
        waiting: turns that no worker has, the oldest first.
        open: turns without a reply, by position, the oldest first.
    """

    def __init__(self, messages: Sequence[Message], window: int) -> None:
        self.waiting = deque(Turn(i, message) for i, message in enumerate(messages))
        self.open = {turn.position: turn for turn in self.waiting}
        self._window = window
        self._users = Counter(id(message.content) for message in messages)
        self._stored: dict[int, tuple[int, Any]] = {}

    def next(self, beside: Turn | None = None) -> Turn | None:
        """Take the next turn for a worker, unless it is too far ahead of the oldest open one.

        Args:
            beside: the turn that the worker has under way, if any. It stays alone if it or the next must be.
        """
        if not self.waiting or self.waiting[0].position >= next(iter(self.open)) + self._window:
            return None
        if beside is not None and (beside.alone or self.waiting[0].alone):
            return None
        return self.waiting.popleft()

    def give_back(self, turns: Iterable[Turn]) -> None:
        """Put turns that were not run to the head of the queue."""
        self.waiting.extendleft(sorted(turns, key=lambda turn: -turn.position))

    def close(self, turn: Turn) -> None:
        """Strike off an answered turn, and let go of content that no open turn needs."""
        del self.open[turn.position]
        content = id(turn.message.content)
        self._users[content] -= 1
        if not self._users[content]:
            self._stored.pop(content, None)

    def content(self, turn: Turn) -> tuple[int, Any]:
        """Return key and reference of a turn's content in the object store, where it is put when first asked for.

        Messages share content that is the same object. Keys are unique in this process.
        """
        import ray

        content = turn.message.content
        if id(content) not in self._stored:
            self._stored[id(content)] = next(_keys), ray.put(content)
        return self._stored[id(content)]
