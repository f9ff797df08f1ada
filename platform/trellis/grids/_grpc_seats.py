"""Who is which client: the seats of a federation, kept over restarts of the server.

A client's data and private state lie with its node. Were the seats dealt anew after a restart, a node could find itself
training another client's part with a state that is not that client's.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable
from pathlib import Path

log = logging.getLogger("trellis.link")


class Seats:
    """Which client each node was, by the instance of its store.

    Args:
        num_clients: of the federation.
        path: of the file that keeps it (``runs.SEATS``); None keeps it in memory. A damaged file is as good as none.
    """

    def __init__(self, num_clients: int, path: Path | None = None) -> None:
        self.num_clients, self.path = num_clients, path
        self._of: dict[str, int] = {}
        if path is not None and path.is_file():
            try:
                self._of = {str(key): int(value) for key, value in json.loads(path.read_text()).items()}
            except (OSError, ValueError, AttributeError, TypeError) as error:
                log.warning("seats not read", extra={"reason": f"{path}: {error}"})
        self._by = {client: instance for instance, client in self._of.items()}
        self._changed = False

    def of(self, instance: str) -> int | None:
        """Return the client that a node was."""
        return self._of.get(instance)

    def free(self, instance: str, taken: Collection[int], absent: Iterable[int], strict: bool) -> int | None:
        """Return a client for a node that may be any, or None where there is none.

        Its own of before comes first, then one that no node ever was, then one whose node has been away.

        Args:
            taken: clients that it cannot be.
            absent: clients whose nodes have been away for so long that their seats may be given to others.
            strict: seats of nodes that have not come back yet, after a restart of the server, are theirs.
        """
        own = self.of(instance)
        if own is not None and own not in taken and own < self.num_clients:
            return own
        kept = set(self._of.values())
        open_ones = [client for client in range(self.num_clients) if client not in taken]
        for choice in (
            [client for client in open_ones if client not in kept],
            [] if strict else open_ones,
            sorted(absent),
        ):
            if choice:
                return choice[0]
        return None

    def give(self, instance: str, client: int) -> None:
        """Note that a node is a client, and that whoever was before is not any more."""
        if self._of.get(instance) == client:
            return
        if (before := self._by.get(client)) is not None:
            self._of.pop(before, None)
        if (old := self._of.get(instance)) is not None:
            del self._by[old]
        self._of[instance], self._by[client] = client, instance
        self._changed = True

    def save(self) -> None:
        """Write the file if something changed."""
        if self.path is None or not self._changed:
            return
        self._changed = False
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self._of, indent=1) + "\n")
            temporary.replace(self.path)
        except OSError as error:  # the checkpoint that follows will say so with its own code
            log.warning("seats not written", extra={"reason": f"{self.path}: {error.strerror}"})
