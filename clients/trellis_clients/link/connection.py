"""The node's end of the link: stays joined, takes tasks, fetches what they refer to, hands in answers.

Every loss of the connection is met with another try, after a pause that doubles up to ``PAUSE_MOST_S`` and is drawn at
random (full jitter), so that a fleet does not come back all at once. Only what cannot get better ends it: credentials
that are refused, or a run that is over.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import grpc

from trellis.errors import GridError
from trellis.wire import methods
from trellis.wire.generated import link_pb2 as pb
from trellis_clients.link.agenda import Agenda, EndedError
from trellis_clients.link.lines import Lines, plain
from trellis_clients.link.transfers import HOPELESS, Counted, Transfers

log = logging.getLogger("trellis.node")

PAUSE_FIRST_S, PAUSE_MOST_S = 0.2, 20.0
JOIN_S, LEAVE_S = 20.0, 1.0
"""Longest to wait for an answer to Join and Leave."""


@dataclass
class Identity:
    """Who the node is and what it shows.

    Attributes:
        address: of the server, host and port.
        node: its name; may be empty where credentials say it.
        instance: of its store.
        client: which client it wants to be, None for any.
        kind: ``pb.NODE_KIND_TRAIN`` or ``pb.NODE_KIND_EDGE``.
        token: bearer token.
        channel_credentials: for TLS; None speaks plain text.
        give_up_after_s: without a connection for this long it ends; None never does.
    """

    address: str
    node: str
    instance: str
    client: int | None = None
    kind: pb.NodeKind = pb.NODE_KIND_TRAIN
    token: str | None = field(default=None, repr=False)
    channel_credentials: grpc.ChannelCredentials | None = field(default=None, repr=False)
    give_up_after_s: float | None = None


class Connection:
    """Stays joined from ``start`` to ``close``; ``tasks`` yields what there is to do.

    Args:
        identity: see there.
        folder: where payloads that outgrow memory lie; None takes the system's.
        counted: called with the name of an event and its labels, for metrics.

    Attributes:
        joined: the server's latest welcome.
        agenda: the tasks that are here.
        log: says with each line what the node is at.
    """

    def __init__(self, identity: Identity, folder: Path | None = None, counted: Counted = lambda *_: None) -> None:
        self.identity, self.counted = identity, counted
        self.joined: pb.JoinResponse | None = None
        self.agenda = Agenda()
        self.log = Lines(log)
        metadata = (("authorization", f"Bearer {identity.token}"),) if identity.token else ()
        self._metadata: tuple[tuple[str, str], ...] = metadata
        if identity.channel_credentials is None:
            self._channel = grpc.insecure_channel(identity.address, options=methods.KEEPALIVE)
        else:
            self._channel = grpc.secure_channel(
                identity.address, identity.channel_credentials, options=methods.KEEPALIVE
            )
        self._calls = methods.stubs(self._channel)
        self._transfers = Transfers(
            self._calls, metadata, self._welcome, self.agenda, self._pause, self.log, folder, counted
        )
        self.payload, self.submit = self._transfers.payload, self._transfers.submit
        self.done = self.agenda.done
        self._there = threading.Event()
        self._stopped = threading.Event()
        self._closing = threading.Lock()
        self._stream: Any = None
        self._jitter = random.Random()  # pauses only: nothing that a run computes depends on it
        self._thread = threading.Thread(target=self._stay, name="trellis-node", daemon=True)

    def start(self) -> pb.JoinResponse:
        """Join, waiting for the server if need be, and return its welcome.

        Raises:
            GridError: the server does not want this node, or was not reached in time.
            EndedError: the run is over, or the node was told to stop.
        """
        self._thread.start()
        self._there.wait()
        self.agenda.check()
        if self.joined is None:
            raise EndedError("")
        return self.joined

    def tasks(self) -> Iterator[pb.Task]:
        """Yield tasks as they come, each once, until there are no more; see ``Agenda.tasks``."""
        return self.agenda.tasks()

    def go_on(self, task: str) -> None:
        """Return if work on a task is still of use; see ``Agenda.go_on``."""
        self.agenda.go_on(task)

    def finish(self) -> None:
        """Take no more tasks. ``start`` returns, ``tasks`` ends after the one under way. From any thread."""
        self.agenda.finish()
        self._there.set()

    def close(self, reason: str = "") -> None:
        """Leave, with a word to the server where it can be reached. Safe to call twice, from any thread."""
        with self._closing:  # a second caller waits: the process may end after it, and the word is not out yet
            if not self._stopped.is_set():
                self._close(reason)

    def _close(self, reason: str) -> None:
        self._stopped.set()
        first = self.agenda.end(EndedError(""))
        self._there.set()
        if self.joined is not None and first:
            with contextlib.suppress(grpc.RpcError):  # it will notice by itself
                self._calls["Leave"](
                    pb.LeaveRequest(session=self.joined.session, reason=reason),
                    metadata=self._metadata,
                    timeout=LEAVE_S,
                )
        if self._stream is not None:
            self._stream.cancel()
        self._channel.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    # -- the thread that stays joined -------------------------------------------------------------------

    def _stay(self) -> None:
        try:
            self._stay_joined()
        except EndedError as error:
            self._end(error)
        except Exception as error:  # a fault here must not leave a node that waits for ever
            if not self._stopped.is_set():
                self.log.exception("the link failed")
                self._end(error)

    def _stay_joined(self) -> None:
        failures, lost = 0, time.monotonic()
        patience = self.identity.give_up_after_s
        while not self._stopped.is_set():
            try:
                self._join()
                for event in self._listen():
                    failures, lost = 0, time.monotonic()
                    self._handle(event)
                reason = "the server ended the stream"
            except grpc.RpcError as error:
                if self._stopped.is_set():
                    return
                code, reason = error.code(), plain(error.details())
                if code in HOPELESS:
                    raise GridError("link-refused", f"{self.identity.address} refused this node: {reason}") from None
                reason = f"{code.name}: {reason}"
            finally:
                self.counted("connected", {"value": "0"})
            pause = self._pause(failures)
            failures += 1
            if patience is not None:
                left = lost + patience - time.monotonic()
                if left < 0:
                    said = f"{self.identity.address} has not been reached for {patience:g} s"
                    raise GridError("link-lost", said)
                pause = min(pause, left + 0.01)  # the last try comes when time is up, and not a long pause later
            self.log.info("not connected", extra={"reason": reason, "pause": round(pause, 2)})
            self._stopped.wait(pause)

    def _pause(self, failures: int) -> float:
        """Return the seconds to wait before the next try."""
        return self._jitter.uniform(0, min(PAUSE_MOST_S, PAUSE_FIRST_S * 2 ** min(failures, 20)))

    def _join(self) -> None:
        who = self.identity
        request = pb.JoinRequest(
            protocol=methods.PROTOCOL,
            node=who.node,
            instance=who.instance,
            kind=who.kind,
            encodings=[pb.ENCODING_ZSTD],
            software=software(),
        )
        if who.client is not None:
            request.client = who.client
        patience = min(JOIN_S, who.give_up_after_s or JOIN_S)
        joined = self._calls["Join"](request, metadata=self._metadata, timeout=patience)
        again, self.joined = self.joined is not None, joined
        self.log.about.update(run=plain(joined.run), client=joined.client)
        if who.node:
            self.log.about.update(node=who.node)
        self._there.set()
        self.log.info("joined")
        self.counted("connected", {"value": "1"})
        if again:
            self.counted("reconnect", {})

    def _listen(self) -> Iterator[pb.WorkResponse]:
        """Yield the stream's events, and end it where no beat comes."""
        joined = self._welcome()
        self.agenda.new_stream()
        self._stream = stream = self._calls["Work"](pb.WorkRequest(session=joined.session), metadata=self._metadata)
        heard = [time.monotonic()]
        patience = 3 * max(joined.beat_seconds, 0.1)
        over = threading.Event()

        def watch() -> None:
            while not over.wait(patience / 6):
                if time.monotonic() - heard[0] > patience:
                    stream.cancel()
                    return

        watcher = threading.Thread(target=watch, name="trellis-node-beat", daemon=True)
        watcher.start()
        try:
            for event in stream:
                heard[0] = time.monotonic()
                yield event
        finally:
            over.set()
            stream.cancel()

    def _handle(self, event: pb.WorkResponse) -> None:
        what = event.WhichOneof("event")
        if what == "task":
            self.agenda.receive(event.task, self._welcome())
        elif what == "cancel":
            self.agenda.cancel(event.cancel.task_id)
        elif what == "beat" and event.beat.complete:
            self.agenda.complete()
        elif what == "goodbye" and event.goodbye.final:
            raise EndedError(plain(event.goodbye.reason) or "the run is over")

    def _welcome(self) -> pb.JoinResponse:
        assert self.joined is not None
        return self.joined

    def _end(self, why: BaseException) -> None:
        self.agenda.end(why)
        self._there.set()


def software() -> dict[str, str]:
    """Return the versions of what computes here, for the server's log."""
    found = {}
    for name in ("trellis", "flwr", "torch", "onnxruntime", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
