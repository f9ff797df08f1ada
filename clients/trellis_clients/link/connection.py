"""The node's end of the link: stays joined, takes tasks, fetches what they refer to, hands in answers.

Every loss of the connection is met with another try, after a pause that doubles up to ``PAUSE_MOST_S`` and is drawn at
random (full jitter), so that a fleet does not come back all at once. Only what cannot get better ends it: credentials
that are refused, or a run that is over.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc

from trellis.errors import DataError, GridError
from trellis.wire import methods
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.payload import Receiver, chunks, encode

log = logging.getLogger("trellis.node")

PAUSE_FIRST_S, PAUSE_MOST_S = 0.2, 20.0
CACHED_BYTES = 256_000_000
"""Payloads kept in case the next task refers to them again, e.g. the model that is evaluated after training."""

HOPELESS = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
}
"""Answers to Join that would be the same the next time."""


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


class EndedError(Exception):
    """The server said goodbye for good, or the node was told to stop. ``str`` is the reason."""


class Connection:
    """Stays joined from ``start`` to ``close``; ``tasks`` yields what there is to do.

    Args:
        identity: see there.

    Attributes:
        joined: the server's latest welcome.
    """

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.joined: pb.JoinResponse | None = None
        self._metadata = (("authorization", f"Bearer {identity.token}"),) if identity.token else ()
        if identity.channel_credentials is None:
            self._channel = grpc.insecure_channel(identity.address, options=methods.KEEPALIVE)
        else:
            self._channel = grpc.secure_channel(
                identity.address, identity.channel_credentials, options=methods.KEEPALIVE
            )
        self._calls = methods.stubs(self._channel)
        self._tasks: queue.Queue[pb.Task | None] = queue.Queue()
        self._seen: set[str] = set()
        self._cancelled: set[str] = set()
        self._lock = threading.Lock()
        self._there = threading.Event()
        self._stopped = threading.Event()
        self._end: BaseException | None = None
        self._stream: Any = None
        self._cache: OrderedDict[str, Any] = OrderedDict()
        self._jitter = random.Random()  # pauses only: nothing that a run computes depends on it
        self._thread = threading.Thread(target=self._stay, name="trellis-node", daemon=True)

    def start(self) -> pb.JoinResponse:
        """Join, waiting for the server if need be, and return its welcome.

        Raises:
            GridError: the server does not want this node, or was not reached in time.
        EndedError: the node was told to stop.
        """
        self._thread.start()
        self._there.wait()
        self._raise_end()
        if self.joined is None:
            raise EndedError("this node stops")
        return self.joined

    def tasks(self) -> Iterator[pb.Task]:
        """Yield tasks as they come, each once, and leave out those that were cancelled before their turn.

        Raises:
            EndedError: there will be no more.
            GridError: the connection is lost for good.
        """
        while True:
            task = self._tasks.get()
            if task is None:
                self._raise_end()
                return
            with self._lock:
                cancelled = task.id in self._cancelled
                self._cancelled.discard(task.id)
                if cancelled:
                    self._seen.discard(task.id)
            if not cancelled:
                yield task

    def wake(self) -> None:
        """Make ``tasks`` end where it waits."""
        self._tasks.put(None)

    def done(self, task: str) -> None:
        """Say that a task is over on this side: should the server send it again, it is to be answered again."""
        with self._lock:
            self._seen.discard(task)
            self._cancelled.discard(task)

    def cancelled(self, task: str) -> bool:
        """Return whether the server has no use for a task's answer any more."""
        with self._lock:
            return task in self._cancelled

    def go_on(self, task: str) -> None:
        """Return if work on a task is still of use.

        Raises:
            EndedError: nobody waits for it any more, or the node was told to stop.
            GridError: the connection is lost for good.
        """
        self._raise_end()
        if self._stopped.is_set():
            raise EndedError("this node stops")
        if self.cancelled(task):
            raise EndedError("")

    def payload(self, payload: pb.Payload, task: str) -> Any:
        """Return a payload's decoded bytes as a buffer, from the task, the cache or the server.

        Raises:
            DataError: it is not what it was said to be.
            EndedError: nobody waits for the task any more.
        """
        joined = self.joined
        assert joined is not None
        if payload.inline:
            receiver = Receiver(payload, joined.max_payload_bytes)
            receiver.add(payload.inline)
            return receiver.finish()
        if payload.digest in self._cache:
            self._cache.move_to_end(payload.digest)
            return self._cache[payload.digest]
        buffer = self._retried(lambda: self._fetch(payload, joined.max_payload_bytes), task)
        self._cache[payload.digest] = buffer
        while sum(map(len, self._cache.values())) > CACHED_BYTES and len(self._cache) > 1:
            self._cache.popitem(last=False)
        return buffer

    def submit(
        self,
        task: str,
        answer: bytes | None,
        failure: tuple[int, str] | None = None,
        encoding: pb.Encoding = pb.ENCODING_NONE,
    ) -> int:
        """Hand in an answer or a failure, as often as it takes, and return the verdict.

        Raises:
            EndedError: the run is over.
        """
        if answer is None:
            assert failure is not None
            outcome, data = {"failure": pb.Failure(code=failure[0], reason=failure[1][:1000])}, b""
        else:
            payload, data = encode(answer, encoding)
            payload.inline = b""
            outcome = {"answer": payload}

        def parts() -> Iterator[pb.SubmitRequest]:
            assert self.joined is not None
            yield pb.SubmitRequest(header=pb.SubmitHeader(session=self.joined.session, task_id=task, **outcome))
            for chunk in chunks(data, size=min(self.joined.chunk_bytes or 1_000_000, 3_000_000)):
                yield pb.SubmitRequest(data=chunk)

        def once() -> pb.SubmitResponse:
            response: pb.SubmitResponse = self._calls["Submit"](parts(), metadata=self._metadata)
            return response

        response = self._retried(once, task)
        if response.verdict == pb.VERDICT_REFUSED:
            log.warning("answer refused", extra={"task": task, "reason": response.reason})
        return int(response.verdict)

    def close(self, reason: str = "") -> None:
        """Leave, with a word to the server where it can be reached. Safe to call twice."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._there.set()
        if self.joined is not None and self._end is None:
            with contextlib.suppress(grpc.RpcError):  # it will notice by itself
                self._calls["Leave"](
                    pb.LeaveRequest(session=self.joined.session, reason=reason), metadata=self._metadata, timeout=2.0
                )
        if self._stream is not None:
            self._stream.cancel()
        self._channel.close()
        self._tasks.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(5.0)

    # -- the thread that stays joined -------------------------------------------------------------------

    def _stay(self) -> None:
        pauses = 0
        lost = time.monotonic()
        while not self._stopped.is_set():
            try:
                self._join()
                for event in self._listen():
                    pauses, lost = 0, time.monotonic()
                    self._handle(event)
                reason = "the server ended the stream"
            except grpc.RpcError as error:
                if self._stopped.is_set():
                    return
                code, details = error.code(), error.details()
                if code in HOPELESS:
                    self._finish(GridError("link-refused", f"{self.identity.address} refused this node: {details}"))
                    return
                reason = f"{code.name}: {details}"
            except EndedError as error:
                self._finish(error)
                return
            patience = self.identity.give_up_after_s
            if patience is not None and time.monotonic() - lost > patience:
                self._finish(GridError("link-lost", f"{self.identity.address} has not been reached for {patience:g} s"))
                return
            pause = self._jitter.uniform(0, min(PAUSE_MOST_S, PAUSE_FIRST_S * 2**pauses))
            pauses = min(pauses + 1, 20)
            log.info("not connected", extra={"reason": reason, "pause": round(pause, 2)})
            self._stopped.wait(pause)

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
        patience = min(20.0, who.give_up_after_s or 20.0)
        joined = self._calls["Join"](request, metadata=self._metadata, timeout=patience)
        with self._lock:
            self.joined = joined
        self._there.set()
        log.info("joined", extra={"run": joined.run, "client": joined.client})

    def _listen(self) -> Iterator[pb.WorkResponse]:
        """Yield the stream's events, and end it where no beat comes."""
        assert self.joined is not None
        self._stream = stream = self._calls["Work"](
            pb.WorkRequest(session=self.joined.session), metadata=self._metadata
        )
        heard = [time.monotonic()]
        patience = 3 * max(self.joined.beat_seconds, 0.1)
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
            with self._lock:
                new = event.task.id not in self._seen
                self._seen.add(event.task.id)
                self._cancelled.discard(event.task.id)
            if new:
                self._tasks.put(event.task)
        elif what == "cancel":
            with self._lock:
                if event.cancel.task_id in self._seen:
                    self._cancelled.add(event.cancel.task_id)
        elif what == "goodbye" and event.goodbye.final:
            raise EndedError(event.goodbye.reason)

    def _finish(self, end: BaseException) -> None:
        self._end = end
        self._there.set()
        self._tasks.put(None)

    def _raise_end(self) -> None:
        if self._end is not None:
            raise self._end

    # -- calls that are repeated ------------------------------------------------------------------------

    def _fetch(self, payload: pb.Payload, limit: int) -> Any:
        """Fetch a payload; what has come stays come when the connection breaks."""
        receiver = Receiver(payload, limit)
        while True:
            assert self.joined is not None
            request = pb.FetchRequest(session=self.joined.session, digest=payload.digest, offset=receiver.received)
            try:
                for part in self._calls["Fetch"](request, metadata=self._metadata):
                    receiver.add(part.data)
                return receiver.finish()
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or self._stopped.wait(PAUSE_FIRST_S):
                    raise

    def _retried(self, call: Callable[[], Any], task: str) -> Any:
        """Repeat a call until it is answered. A session that is gone is waited for: the other thread joins again."""
        pauses = 0
        while True:
            self.go_on(task)
            try:
                return call()
            except grpc.RpcError as error:
                code = error.code()
                if code in HOPELESS - {grpc.StatusCode.UNAUTHENTICATED}:
                    raise DataError("link-call", f"{code.name}: {error.details()}") from None
                log.info("call repeated", extra={"task": task, "reason": f"{code.name}: {error.details()}"})
            self._stopped.wait(self._jitter.uniform(0, min(PAUSE_MOST_S, PAUSE_FIRST_S * 2**pauses)))
            pauses = min(pauses + 1, 20)


def software() -> dict[str, str]:
    """Return the versions of what computes here, for the server's log."""
    found = {}
    for name in ("trellis", "flwr", "torch", "onnxruntime", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
