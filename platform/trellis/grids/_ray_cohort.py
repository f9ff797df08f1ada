"""The messages of one stream of ``RayGrid``: which wait, which are open, and the content they share."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flwr.app import Message

from trellis import flower
from trellis.grids._ray_contents import Contents, Parcel
from trellis.records import content_bytes

_tickets = itertools.count(1)


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


class Batch:
    """Turns that a worker is sent in one call, and hands in together.

    Attributes:
        turns: in the order in which they are run. None for one that went to another worker meanwhile: whatever
            becomes of it here does not count.
        tickets: a number for each, unique in this process, by which the worker tells which one it is at.
    """

    def __init__(self, turns: Iterable[Turn]) -> None:
        self.turns: list[Turn | None] = list(turns)
        self.tickets = [next(_tickets) for _ in self.turns]

    @property
    def counting(self) -> list[Turn]:
        """The turns that count."""
        return [turn for turn in self.turns if turn is not None]

    @property
    def alone(self) -> bool:
        return any(turn.alone for turn in self.counting)

    def take_back(self, but: int | None) -> list[Turn]:
        """Take back all turns but the one with a ticket; if none here has it, all but the first."""
        kept = self.tickets.index(but) if but in self.tickets else 0
        taken = [turn for place, turn in enumerate(self.turns) if turn is not None and place != kept]
        self.turns = [turn if place == kept else None for place, turn in enumerate(self.turns)]
        return taken


class Cohort:
    """The turns of one stream.

    Attributes:
        waiting: turns that no worker has, the oldest first.
        open: turns without a reply, by position, the oldest first.
        largest: bytes of the largest content.
    """

    def __init__(self, messages: Sequence[Message], window: int) -> None:
        self.waiting = deque(Turn(i, message) for i, message in enumerate(messages))
        self.open = {turn.position: turn for turn in self.waiting}
        self._window = window
        self._users = Counter(id(message.content) for message in messages)
        self._parcels: dict[int, Parcel] = {}
        self.largest = largest(messages)

    def batch(self, most: int, beside: Turn | Batch | None = None) -> Batch | None:
        """Take the next turns for a worker, at most so many, all with one content. ``beside`` as for ``next``."""
        first = turn = self.next(beside)
        if first is None:
            return None
        turns = [first]
        while len(turns) < most and self.waiting and self.waiting[0].message.content is first.message.content:
            if turns[-1].alone or (turn := self.next(turns[-1])) is None:
                break
            turns.append(turn)
        return Batch(turns)

    def next(self, beside: Turn | Batch | None = None) -> Turn | None:
        """Take the next turn for a worker, unless it is too far ahead of the oldest open one.

        Args:
            beside: what the worker has under way, if anything. It stays alone if it or the next must be.
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
            self._parcels.pop(content, None)

    def parcel(self, turn: Turn, contents: Contents) -> Parcel:
        """Return a turn's content as it is sent. Messages share content that is the same object."""
        content = turn.message.content
        if id(content) not in self._parcels:
            self._parcels[id(content)] = contents.packed(content)
        return self._parcels[id(content)]


def largest(messages: Iterable[Message]) -> int:
    """Return the bytes of the largest content; what messages share is looked at once."""
    contents = {id(message.content): message.content for message in messages if message.has_content()}
    return max(map(content_bytes, contents.values()), default=0)
