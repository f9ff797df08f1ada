"""Flower's own grids, made to look like ours: one reply per message, under the ids we gave."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from trellis import flower
from trellis.grids.base import Layer

POLL_S = 0.05
"""Flower's grids can only be asked again; its own loop asks every 0.1 to 3 s."""


class ForeignGrid(Layer):
    """Stream replies from a grid that can only push and pull, such as Flower's in-memory or HTTP one.

    Flower insists on giving message ids itself, so ours are taken off on the way out and put back on replies.
    """

    def __init__(self, inner: Grid) -> None:
        super().__init__(inner)

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        numbered = flower.number(messages)
        ours = [message.metadata.message_id for message in numbered]
        for message in numbered:
            flower.rename(message, "")
        open_ = dict(zip(self.inner.push_messages(numbered), zip(ours, numbered, strict=True), strict=True))
        for message, name in zip(numbered, ours, strict=True):
            flower.rename(message, name)
        end = None if timeout is None else time.monotonic() + timeout
        while open_:
            for reply in self.inner.pull_messages(list(open_)):
                name, _ = open_.pop(reply.metadata.reply_to_message_id)
                flower.rename_reply(reply, name)
                yield reply
            if open_ and end is not None and time.monotonic() > end:
                break
            if open_:
                time.sleep(POLL_S)
        for _, message in open_.values():
            yield flower.failure(message, flower.FAILED_DEADLINE, f"no reply before the deadline of {timeout:g} s")
