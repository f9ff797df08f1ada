"""What a node fetches and hands in, over a connection that may break at any moment.

A call is repeated until it is answered, after a pause that doubles, for as long as its task is of use. What has come of
a payload stays come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc

from trellis.errors import DataError, RunError
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.payload import Receiver, chunks, encode
from trellis_clients.link.agenda import Agenda
from trellis_clients.link.lines import Lines, plain

CACHED_BYTES = 256_000_000
"""Payloads kept in case the next task refers to them again, e.g. the model that is evaluated after training."""

CHUNK_MOST = 3_000_000
"""Bytes of a chunk, whatever the server allows: gRPC takes messages up to 4 MB."""

HOPELESS = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
}
"""Answers to Join that would be the same the next time."""

Counted = Callable[[str, Mapping[str, str]], None]


class Transfers:
    """Payloads of tasks and answers to them.

    Args:
        calls: the link's calls, by name.
        metadata: of every call.
        welcome: returns the server's latest welcome.
        agenda: says which tasks are still of use.
        pause: returns how many seconds to wait after so many failures in a row.
        log: where what is repeated is noted.
        folder: where payloads that outgrow memory lie, without a name; None takes the system's.
        counted: called with ``received`` and ``sent`` and their bytes.
    """

    def __init__(
        self,
        calls: Mapping[str, Any],
        metadata: tuple[tuple[str, str], ...],
        welcome: Callable[[], pb.JoinResponse],
        agenda: Agenda,
        pause: Callable[[int], float],
        log: Lines,
        folder: Path | None,
        counted: Counted,
    ) -> None:
        self._calls, self._metadata, self._welcome = calls, metadata, welcome
        self._agenda, self._pause, self._folder, self._counted, self._log = agenda, pause, folder, counted, log
        self._cache: OrderedDict[str, Any] = OrderedDict()

    def payload(self, payload: pb.Payload, task: str) -> Any:
        """Return a payload's decoded bytes as a buffer, from the task, the cache or the server.

        Raises:
            DataError: it is not what it was said to be.
            RunError: there is no room for it on this node's disk.
            EndedError, GridError: nobody waits for the task any more, or the node's work is over.
        """
        if payload.digest in self._cache and not payload.inline:
            self._cache.move_to_end(payload.digest)
            return self._cache[payload.digest]
        try:
            buffer = self._received(payload, task)
        except OSError as error:
            raise RunError(
                "node-store", f"a payload of {payload.size} bytes cannot be kept: {error.strerror or error}"
            ) from None
        if not payload.inline:
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

        There is no limit of time on it: the server may let it wait, and says so by not reading. It ends with its task.

        Raises:
            DataError: the server does not understand it.
            EndedError, GridError: nobody waits for the task any more, or the node's work is over.
        """
        if answer is None:
            assert failure is not None
            outcome, data = {"failure": pb.Failure(code=failure[0], reason=failure[1][:1000])}, b""
        else:
            payload, data = encode(answer, encoding)
            payload.inline = b""
            outcome = {"answer": payload}

        def parts() -> Iterator[pb.SubmitRequest]:
            welcome = self._welcome()
            yield pb.SubmitRequest(header=pb.SubmitHeader(session=welcome.session, task_id=task, **outcome))
            for chunk in chunks(data, size=min(welcome.chunk_bytes or CHUNK_MOST, CHUNK_MOST)):
                yield pb.SubmitRequest(data=chunk)

        def once() -> pb.SubmitResponse:
            with self._agenda.under_way(
                task, lambda: self._calls["Submit"].future(parts(), metadata=self._metadata)
            ) as call:
                response: pb.SubmitResponse = call.result()
                return response

        with self._agenda.answering(task):
            response = self._repeated(once, task)
        self._counted("sent", {"bytes": str(len(data))})
        if response.verdict == pb.VERDICT_REFUSED:
            self._log.warning("answer refused", extra={"task": task, "reason": plain(response.reason)})
        return int(response.verdict)

    def _received(self, payload: pb.Payload, task: str) -> Any:
        receiver = Receiver(payload, self._welcome().max_payload_bytes, folder=self._folder)
        try:
            if payload.inline:
                receiver.add(payload.inline)
            else:
                self._repeated(lambda: self._fetch(payload, receiver, task), task, lambda: receiver.received)
                self._counted("received", {"bytes": str(receiver.received)})
            return receiver.finish()
        finally:
            receiver.close()

    def _fetch(self, payload: pb.Payload, receiver: Receiver, task: str) -> None:
        """Fetch what has not come yet."""
        request = pb.FetchRequest(session=self._welcome().session, digest=payload.digest, offset=receiver.received)
        try:
            with self._agenda.under_way(task, lambda: self._calls["Fetch"](request, metadata=self._metadata)) as parts:
                for part in parts:
                    self._agenda.go_on(task)
                    receiver.add(part.data)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.ABORTED:  # no open task refers to it: this one was cancelled
                self._agenda.cancel(task)
            raise

    def _repeated(self, call: Callable[[], Any], task: str, progress: Callable[[], int] = lambda: 0) -> Any:
        """Repeat a call until it is answered. A session that is gone is waited for: another thread joins again."""
        failures, before = 0, progress()
        while True:
            try:
                return call()
            except (grpc.RpcError, grpc.FutureCancelledError) as error:
                self._agenda.go_on(task)
                code = error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.CANCELLED
                reason = f"{code.name}: {plain(error.details() if isinstance(error, grpc.RpcError) else '')}"
                if code in HOPELESS - {grpc.StatusCode.UNAUTHENTICATED}:  # of that the other thread hears too
                    raise DataError("link-call", reason) from None
                self._log.info("call repeated", extra={"task": task, "reason": reason})
            if progress() > before:
                failures, before = 0, progress()
            self._agenda.pause(task, self._pause(failures))
            failures += 1
