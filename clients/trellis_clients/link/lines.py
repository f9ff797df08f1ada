"""Log lines of a node: each says which run, cell, round, client and task it is about."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

LONGEST = 500


class Lines(logging.LoggerAdapter[logging.Logger]):
    """Adds what a node is at to its log lines; what a line says itself goes first.

    Args:
        logger: where they go.

    Attributes:
        about: fields as in ``trellis.deploy.logs``; changed as the node goes on.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.about: dict[str, Any] = {}
        super().__init__(logger, self.about)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """See ``logging.LoggerAdapter``, which would leave out the line's own fields."""
        return msg, {**kwargs, "extra": {**self.about, **(kwargs.get("extra") or {})}}


def plain(said: str | None) -> str:
    """Return what another machine said so that it can be shown: one line, without control characters, not too long."""
    shown = "".join(letter if letter.isprintable() else " " for letter in said or "")
    return " ".join(shown.split())[:LONGEST]
