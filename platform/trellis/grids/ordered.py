"""A layer that puts replies back in the order in which their messages were sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import Grid

from trellis import flower, memory
from trellis.grids.base import Layer


class Ordered(Layer):
    """Yield replies in the order of the messages, so that what folds them sees the same on every grid.

    A reply that comes early waits here for those before it; on ``RayGrid`` its window bounds how many can.
    A large one waits on disk. A second reply to the same message is left out. A reply to a message that was not
    among those sent passes at once: it has no place in the order, and a layer outside may want to report it.

    Args:
        inner: the grid whose replies are put in order.
        folder: where large replies wait; None for the system's temporary folder.
    """

    def __init__(self, inner: Grid, folder: Path | None = None) -> None:
        super().__init__(inner)
        self.folder = folder

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        sent = flower.number(messages)
        place: dict[str, int] = {}
        early: dict[int, Message] = {}
        following = 0
        for reply in super().stream(sent, timeout=timeout):
            # Flower's own grids give messages their ids as they send them, so ids are read after that.
            place = place or {message.metadata.message_id: i for i, message in enumerate(sent)}
            position = place.get(reply.metadata.reply_to_message_id)
            if position is None:
                yield reply
            elif position >= following and position not in early:
                early[position] = reply
                if position > following:
                    memory.spill(reply, self.folder)
            del reply  # or it would be held while the next one is made
            while following in early:
                yield early.pop(following)
                following += 1
        for position in sorted(early):  # what stands behind a message that was never answered
            yield early[position]
