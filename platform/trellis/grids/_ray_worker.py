"""The process at the other end of ``RayGrid``: it holds one client app and walks through clients with it."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
from flwr.app import Message, Metadata, RecordDict
from flwr.clientapp import ClientApp

from trellis import flower
from trellis.errors import TrellisError
from trellis.grids._ray_board import BoardAt, Place
from trellis.grids._ray_contents import unpacked
from trellis.grids.local import client_context, run_client

AppFactory = Callable[[], ClientApp] | tuple[str, tuple[Any, ...]]
"""Makes the client app in a worker: something callable, or ``("package.module:function", arguments)``."""

Envelope = tuple[Any, ...]
"""A message's metadata in the order of the fields of ``Metadata``, much lighter to send than the object."""

Failed = tuple[int, str]
Outcome = tuple[RecordDict | None, Failed | None, RecordDict | None, float, bool]
"""A reply's content or error, the state to keep, seconds it took, and whether the worker has grown too big."""

Order = tuple[int, Envelope, RecordDict | None]
"""A turn as it is sent: its ticket, the message's metadata, and what the client keeps, if anything."""

BATCH_S = 0.05
"""Seconds after which a worker hands in what it has of a batch, and leaves the rest to be sent again."""

_FIELDS = (
    "run_id",
    "message_id",
    "src_node_id",
    "dst_node_id",
    "reply_to_message_id",
    "group_id",
    "created_at",
    "ttl",
    "message_type",
    "src_task_id",
    "dst_task_id",
)


def envelope(message: Message) -> Envelope:
    """Return what a worker needs to rebuild the message, but for its content."""
    metadata = message.metadata
    return tuple(getattr(metadata, field) for field in _FIELDS)


class Worker:
    """One Ray actor. Calls arrive one at a time, in the order in which the grid sent them."""

    def __init__(self, num_clients: int, threads: int, memory_limit_mb: int | None) -> None:
        # For numerical libraries that the client app is yet to import; those already there are set in build().
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(threads)
        self._num_clients = num_clients
        self._threads = threads
        self._limit = memory_limit_mb
        self._process = psutil.Process()
        self._content: tuple[int, RecordDict] | None = None
        self._worn = False
        self._place: Place | None = None

    def build(self, make_app: AppFactory, board: BoardAt, seat: int) -> tuple[str | None, float, bool]:
        """Make the client app.

        Returns:
            What went wrong, if anything; the memory in use in MB; whether this process can write on the board.
        """
        flower.enter_run()
        flower.quiet()
        try:
            self._app = make_app() if callable(make_app) else _resolve(make_app[0])(*make_app[1])
        except (Exception, SystemExit) as error:
            name = "" if isinstance(error, TrellisError) else f"{type(error).__name__}: "
            return f"{name}{error}", 0.0, False
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(self._threads)
        self._place = Place.on(board, seat)
        return None, self._resident_mb(), self._place is not None

    def run(self, orders: list[Order], key: int, *content: Any) -> list[Outcome | None]:
        """Run clients one after another.

        Args:
            orders: one for each.
            key: names the content that their messages share.
            content: the content itself, as arguments of ``unpacked``; left out where the call before had the same.

        Returns:
            The outcomes. None for a client that was not run: this worker has grown too big, or its time was up.
        """
        if content:
            self._content = key, unpacked(*content)
        outcomes: list[Outcome | None] = []
        end = time.perf_counter() + BATCH_S
        for ticket, sent, state in orders:
            if self._worn or (outcomes and time.perf_counter() > end):
                outcomes.append(None)
                continue
            if self._place:
                self._place.note(ticket)
            outcomes.append(self._run(sent, key, state))
        return outcomes

    def forget(self) -> None:
        """Let go of the content that was sent last."""
        self._content = None

    def _run(self, sent: Envelope, key: int, state: RecordDict | None) -> Outcome:
        start = time.perf_counter()
        if self._content is None or self._content[0] != key:
            return None, (flower.FAILED_WORKER, "the message's content did not reach the worker"), state, 0.0, False
        message = Message(content=self._content[1], metadata=Metadata(*sent))  # type: ignore[call-overload]
        client = flower.client_of(message.metadata.dst_node_id)
        context = client_context(client, self._num_clients, state, message.metadata.run_id)
        reply, kept = run_client(self._app, message, context)
        failed = (reply.error.code, reply.error.reason or "") if reply.has_error() else None
        self._worn = self._limit is not None and self._resident_mb() > self._limit
        seconds = time.perf_counter() - start
        return None if failed else reply.content, failed, kept if len(kept) else None, seconds, self._worn

    def _resident_mb(self) -> float:
        """Memory of this process alone: pages shared with the object store are not its own."""
        memory = self._process.memory_info()
        return float(memory.rss - getattr(memory, "shared", 0)) / 2**20


def _resolve(target: str) -> Callable[..., ClientApp]:
    module, _, name = target.partition(":")
    function: Callable[..., ClientApp] = getattr(importlib.import_module(module), name)
    return function
