"""Where workers on this machine note which turn they are at, so that the grid can look without asking them.

A worker that hangs answers nothing; what it is stuck at, and which clients it had done by then, is read here.
"""

from __future__ import annotations

import mmap
import secrets
import struct
import tempfile

BoardAt = tuple[str, bytes]
"""Path of a board, and what stands at its head."""

_HEAD = 16
_NOTE = struct.Struct("<q")


class Board:
    """A file in memory with one number for each seat: the ticket of the turn that its worker has begun last."""

    def __init__(self, seats: int) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="trellis-board-")  # noqa: SIM115 (closed with the board)
        self._head = secrets.token_bytes(_HEAD)
        self._file.write(self._head + bytes(_NOTE.size * seats))
        self._file.flush()
        self._map = mmap.mmap(self._file.fileno(), 0)

    @property
    def at(self) -> BoardAt:
        return self._file.name, self._head

    def read(self, seat: int) -> int:
        """Return the ticket that was noted last, 0 if none was."""
        ticket: int = _NOTE.unpack_from(self._map, _HEAD + _NOTE.size * seat)[0]
        return ticket

    def close(self) -> None:
        self._map.close()
        self._file.close()


class Place:
    """A worker's place on the board."""

    def __init__(self, board: mmap.mmap, seat: int) -> None:
        self._board = board
        self._offset = _HEAD + _NOTE.size * seat

    @classmethod
    def on(cls, board: BoardAt, seat: int) -> Place | None:
        """Return a seat's place, or None if the board is on another machine."""
        path, head = board
        try:
            with open(path, "r+b") as file:
                found = mmap.mmap(file.fileno(), 0)
        except (OSError, ValueError):
            return None
        return cls(found, seat) if found[:_HEAD] == head else None

    def note(self, ticket: int) -> None:
        _NOTE.pack_into(self._board, self._offset, ticket)
