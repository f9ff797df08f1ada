"""The server end of the link: a gRPC service on an event loop in a thread of its own.

All its state belongs to that thread; the grid talks to it through ``call``. Back-pressure: an upload waits before its
first chunk until there is room for it, and gRPC's flow control keeps the node from sending on.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from trellis.errors import DataError, GridError
from trellis.grids._grpc_seats import Seats
from trellis.grids._grpc_tasks import Answer, Answered, Node, Open, Payloads, references
from trellis.grids._grpc_uploads import FIRST_S, STALLED_S, Room, TooSlowError
from trellis.runs import SEATS
from trellis.wire import methods
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.nodes import NAME, AllowList, Credentials, RefusedError, bearer
from trellis.wire.payload import CHUNK, Receiver, chunks

log = logging.getLogger("trellis.link")
tasks_log = logging.getLogger("trellis.link.tasks")

FAILED_CLIENT, FAILED_WORKER = 2, 8
"""Codes of a failure, as in ``trellis.flower``, which this file could do without."""


FETCHES = 4
"""Payloads that one node may be sent at a time."""


@dataclass(frozen=True)
class Settings:
    """How the link behaves.

    Attributes:
        address: host and port; port 0 takes any.
        credentials: of the server; None speaks plain text.
        allow: who may join; None lets anybody in.
        beat_s: on a quiet stream a node hears from the server this often.
        leave_after_s: a node that is gone for this long fails its open tasks.
        give_up_after_s: with no node connected for this long, waiting ends with an error.
        max_payload_bytes: no payload may be larger, encoded or decoded.
        uploads_bytes: answers that may be under way or wait to be read, together; one may go beyond.
        keep_answers: how many answers a node keeps in case the server loses them.
        folder: where large answers wait, and where it is kept who is which client; None for the system's temporary
            folder, and nowhere.

    Raises:
        GridError: a time or size is not above zero.
    """

    address: str = "127.0.0.1:0"
    credentials: grpc.ServerCredentials | None = None
    allow: AllowList | None = None
    beat_s: float = 10.0
    leave_after_s: float = 90.0
    give_up_after_s: float = 300.0
    max_payload_bytes: int = 2_000_000_000
    uploads_bytes: int = 1_000_000_000
    keep_answers: int = 8
    folder: Path | None = None

    def __post_init__(self) -> None:
        for name in ("beat_s", "leave_after_s", "give_up_after_s", "max_payload_bytes", "uploads_bytes"):
            if not getattr(self, name) > 0:
                option = name.removesuffix("_s").removesuffix("_bytes").replace("_", "-")
                raise GridError("link-settings", f"{option} is {getattr(self, name)}; it has to be above 0")


class Link:
    """The service, started.

    Args:
        settings: see there.
        num_clients: clients of the federation.
        run: name of the run.
        counted: called with the name of an event and its labels, for metrics.

    Attributes:
        port: where it listens.

    Raises:
        GridError: the address cannot be listened on.
    """

    def __init__(
        self,
        settings: Settings,
        num_clients: int,
        run: str,
        counted: Callable[[str, Mapping[str, str]], None] = lambda *_: None,
    ) -> None:
        self.settings, self.num_clients, self.run, self.counted = settings, num_clients, run, counted
        self.nodes: dict[int, Node] = {}
        self.payloads = Payloads()
        self.setups: dict[str, bytes] = {}
        self.changed = threading.Condition()
        self.none_since: float | None = time.monotonic()
        self.port = 0
        self.answered = Answered()
        self.seats = Seats(num_clients, settings.folder / SEATS if settings.folder else None)
        self.room: Room
        self._sessions: dict[str, Node] = {}
        self._names: dict[str, Node] = {}
        self._started = time.monotonic()
        self._asked: asyncio.Event
        self._closing: pb.Goodbye | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trellis-link", daemon=True)
        self._thread.start()
        try:
            self.call(self._start)
        except BaseException:
            self._stop_loop()
            raise

    # -- from other threads -----------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function, or a coroutine function, on the link's thread and return what it returns."""

        async def run() -> Any:
            result = function(*args)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def connected(self) -> list[int]:
        """Return the clients whose nodes are connected, or were until a moment ago."""
        return self.call(self._present)  # type: ignore[no-any-return]

    def close(self, reason: str = "the run is over", final: bool = True) -> None:
        """Say goodbye to all nodes and stop. Safe to call twice."""
        if self._thread.is_alive():
            self.call(self._stop, reason, final)
            self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- on the link's thread ---------------------------------------------------------------------------

    async def _start(self) -> None:
        self.room, self._asked = Room(self.settings.uploads_bytes), asyncio.Event()
        self._server = grpc.aio.server(options=methods.SERVER_OPTIONS)
        calls = {"Join": self.join, "Work": self.work, "Fetch": self.fetch, "Submit": self.submit, "Leave": self.leave}
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc

        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for service in ("", methods.SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self._server.add_generic_rpc_handlers((methods.handlers(calls),))
        s = self.settings
        try:
            if s.credentials is None:
                self.port = self._server.add_insecure_port(s.address)
            else:
                self.port = self._server.add_secure_port(s.address, s.credentials)
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise GridError("link-address", f"cannot listen on {s.address}: in use, or not an address of this machine")
        await self._server.start()
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _stop(self, reason: str, final: bool) -> None:
        self._closing = pb.Goodbye(reason=reason, final=final)
        self._watcher.cancel()
        self.seats.save()
        await self._health.enter_graceful_shutdown()
        for node in self.nodes.values():
            node.wake.set()
        await self._server.stop(grace=2.0)

    def open(self, tasks: list[Open], payloads: Mapping[str, bytes]) -> None:
        """Give nodes their tasks. ``payloads`` holds what the tasks refer to and do not carry, by digest."""
        for each in tasks:
            for digest in references(each.task):
                self.payloads.hold(digest, payloads[digest])
            node = self.nodes.get(each.client)
            if node is None:
                self._finish(each, Answer(code=FAILED_WORKER, reason="no node is this client"))
                continue
            after = self.answered.after(each.client, each.task.cell)
            if after is not None and not node.tasks:  # of two questions at once the second starts where the first ends
                each.task.after = after
            node.tasks[each.task.id] = each
            if each.task.id in node.cancelled:  # closed a moment ago, and asked again before the node heard of it
                node.cancelled.remove(each.task.id)
            node.wake.set()
        self.seats.save()  # before anybody's state depends on it
        if not self._asked.is_set():
            self._asked.set()
            for node in self.nodes.values():
                node.wake.set()

    def close_task(self, client: int, name: str, answer: Answer) -> bool:
        """End a task without its node: too late, or the caller wants no more. The node is told.

        Returns:
            Whether it was open. One that was not has had its answer, or is nobody's.
        """
        node = self.nodes.get(client)
        if node is None or name not in node.tasks:
            return False
        self._cancel(node, name, answer)
        return True

    def _cancel(self, node: Node, name: str, answer: Answer) -> None:
        each = node.tasks.pop(name)
        node.cancelled.append(name)
        node.wake.set()
        self._finish(each, answer)

    def _finish(self, each: Open, answer: Answer) -> None:
        each.stop_upload()
        for digest in references(each.task):
            self.payloads.drop(digest)
        each.close(answer)

    def _present(self) -> list[int]:
        return sorted(n.client for n in self.nodes.values() if not n.absent_for(self.settings.leave_after_s))

    def figures(self) -> dict[str, int]:
        """Return what a person wants to see of the link, from any thread; near enough, as nothing is locked for it."""
        nodes = list(self.nodes.values())
        return {
            "clients": self.num_clients,
            "connected": sum(node.connected for node in nodes),
            "tasks": sum(len(node.tasks) for node in nodes),
            "answer_bytes": self.room.used,
            "payload_bytes": self.payloads.num_bytes,
        }

    def _note_change(self) -> None:
        connected = any(node.connected for node in self.nodes.values())
        self.none_since = None if connected else self.none_since or time.monotonic()
        with self.changed:
            self.changed.notify_all()

    async def _watch(self) -> None:
        """Fail the tasks of nodes that stay away; shut out those whose credentials ended."""
        pause = min(0.5, self.settings.leave_after_s / 4)
        while True:
            await asyncio.sleep(pause)
            try:
                if self.settings.allow is not None:
                    await asyncio.to_thread(self.settings.allow.refresh)
                for node in list(self.nodes.values()):
                    self._look_after(node)
                self.seats.save()
            except Exception:
                log.exception("watching the nodes failed; it is tried again")

    def _look_after(self, node: Node) -> None:
        if node.tasks and node.absent_for(self.settings.leave_after_s):
            self._fail_tasks(node, f"its node has been gone for {self.settings.leave_after_s:g} s")
        allow = self.settings.allow
        if allow is not None and (reason := allow.objection(node.name, node.credential, node.client)):
            self._shut_out(node, reason)

    def _fail_tasks(self, node: Node, reason: str) -> None:
        for name in list(node.tasks):
            self._cancel(node, name, Answer(code=FAILED_WORKER, reason=reason))

    def _shut_out(self, node: Node, reason: str) -> None:
        log.warning("node shut out", extra={"node": node.name, "client": node.client, "reason": reason})
        self._sessions.pop(node.session, None)
        if self.nodes.get(node.client) is node:
            del self.nodes[node.client]
        if self._names.get(node.name) is node:
            del self._names[node.name]
        self._fail_tasks(node, reason)
        node.stream += 1
        node.wake.set()
        self.counted("shut-out", {"node": node.name})
        self._note_change()

    # -- the calls --------------------------------------------------------------------------------------

    async def join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        name, credential, given = await self._identify(request, context)
        if request.protocol != methods.PROTOCOL:
            said = f"protocol {request.protocol}; this server speaks {methods.PROTOCOL}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, said)
        before = self._names.get(name)
        if before and before.connected and before.instance != request.instance:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"node {name!r} is connected from somewhere else")
        client = await self._place(request, context, name, before, given)
        node = Node(name, request.instance, client, secrets.token_hex(16), request.kind, credential)
        if before is not None:
            self._sessions.pop(before.session, None)
            before.stream += 1
            before.wake.set()
            self.nodes.pop(before.client, None)
            if before.client == client:
                node.tasks = before.tasks
            else:
                self._fail_tasks(before, f"its node is client {client} from now on")
        self.nodes[client] = self._names[name] = self._sessions[node.session] = node
        self.seats.give(request.instance, client)
        software = {key[:40]: value[:40] for key, value in list(request.software.items())[:10]}
        log.info("node joined", extra={"run": self.run, "node": name, "client": client, "software": software})
        self.counted("join", {"node": name})
        if self.none_since is None:  # it may have been the only one that was connected
            self._note_change()
        s = self.settings
        return pb.JoinResponse(
            session=node.session,
            client=client,
            num_clients=self.num_clients,
            run=self.run,
            max_payload_bytes=s.max_payload_bytes,
            chunk_bytes=CHUNK,
            beat_seconds=s.beat_s,
            keep_answers=s.keep_answers,
        )

    async def _identify(self, request: pb.JoinRequest, context: Any) -> tuple[str, str | None, int | None]:
        """Return the caller's name, the digest of what it showed, and its client by the allow-list; or end the call."""
        if self.settings.allow is None:
            if not re.match(NAME, request.node):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a node's name is like {NAME}")
            return request.node, None, None
        try:
            name, entry, credential = self.settings.allow.identify(shown(context))
        except RefusedError as error:
            log.warning("node refused", extra={"run": self.run, "peer": context.peer(), "reason": str(error)})
            self.counted("refused", {"node": "", "reason": "credentials"})
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            raise AssertionError from None
        if request.node not in ("", name):
            said = f"these credentials are of node {name!r}, not {request.node!r}"
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, said)
        return name, credential, entry.client

    async def _place(
        self, request: pb.JoinRequest, context: Any, name: str, before: Node | None, given: int | None
    ) -> int:
        """Return which client the node is: as the allow-list says, else as it asks, else as before, else a free one."""
        asked = request.client if request.HasField("client") else None
        others = self.settings.allow.reserved(name) if self.settings.allow else set()
        if given is not None and asked not in (None, given):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"node {name!r} is client {given}, not {asked}")
        if asked in others:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"client {asked} is another node's")
        client = given if given is not None else asked
        if client is None:
            client = before.client if before is not None and before.client not in others else None
        if client is None:
            client = self._free_seat(request.instance, before, others)
            if client is None:
                said = f"all {self.num_clients} clients have their node"
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, said)
        assert client is not None
        if client >= self.num_clients:
            said = f"client {client} of a federation of {self.num_clients}"
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, said)
        other = self.nodes.get(client)
        if other is not None and other is not before:
            if given is None and not other.absent_for(self.settings.leave_after_s):
                said = f"client {client} is node {other.name!r}"
                await context.abort(grpc.StatusCode.ALREADY_EXISTS, said)
            self._shut_out(other, "another node took its place")
        return client

    def _free_seat(self, instance: str, before: Node | None, others: set[int]) -> int | None:
        """Return which client a node without a wish may be; not one that the allow-list gives to others."""
        sitting = {node.client: node for node in self.nodes.values() if node is not before}
        away = {client for client, node in sitting.items() if node.absent_for(self.settings.leave_after_s)}
        early = time.monotonic() - self._started < self.settings.leave_after_s
        return self.seats.free(instance, sitting.keys() | others, away - others, strict=early)

    async def _node(self, session: str, context: Any) -> Node:
        node = self._sessions.get(session)
        if node is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such session: join again")
        assert node is not None
        return node

    async def work(self, request: pb.WorkRequest, context: Any) -> AsyncIterator[pb.WorkResponse]:
        node = await self._node(request.session, context)
        node.stream += 1
        mine, sent, new = node.stream, dict[str, Open](), True
        node.gone_since = None
        node.cancelled.clear()
        self._note_change()
        try:
            while node.stream == mine and self._closing is None:
                node.wake.clear()
                sent = {name: each for name, each in sent.items() if node.tasks.get(name) is each}
                for name, each in list(node.tasks.items()):
                    if name not in sent and node.tasks.get(name) is each:
                        sent[name] = each
                        yield pb.WorkResponse(task=each.on_wire())
                while node.cancelled:
                    yield pb.WorkResponse(cancel=pb.Cancel(task_id=node.cancelled.pop()))
                if new and self._asked.is_set():
                    new = False
                    yield pb.WorkResponse(beat=pb.Beat(complete=True))
                if node.wake.is_set():
                    continue
                try:
                    await asyncio.wait_for(node.wake.wait(), self.settings.beat_s)
                except TimeoutError:
                    whole = self._asked.is_set() and not node.wake.is_set()
                    yield pb.WorkResponse(beat=pb.Beat(complete=whole))
            if self._closing is not None:
                yield pb.WorkResponse(goodbye=self._closing)
        finally:
            if node.stream == mine:
                node.gone_since = time.monotonic()
                self._note_change()

    async def fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.FetchResponse]:
        node = await self._node(request.session, context)
        if node.fetches >= FETCHES:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{FETCHES} payloads are on their way to this node")
        node.fetches += 1
        offset = request.offset
        try:
            # Nothing but a chunk is held while it is taken: a node that takes nothing keeps no model of a past round.
            while (chunk := await self._chunk(request.digest, offset, context)) is not None:
                offset += len(chunk)
                yield pb.FetchResponse(data=chunk)
                self.counted("sent", {"node": node.name, "bytes": str(len(chunk))})
        finally:
            node.fetches -= 1

    async def _chunk(self, digest: str, offset: int, context: Any) -> bytes | None:
        """Return what of a payload comes next, None at its end."""
        data = self.payloads.get(digest) or self.setups.get(digest)
        if data is None:
            await context.abort(grpc.StatusCode.ABORTED, "no task that is open refers to this payload")
            raise AssertionError
        if offset > len(data):
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, f"offset {offset} of {len(data)} bytes")
        return next(chunks(data, offset), None)

    async def submit(self, requests: AsyncIterator[pb.SubmitRequest], context: Any) -> pb.SubmitResponse:
        try:
            async with asyncio.timeout(FIRST_S):
                first = await anext(aiter(requests), None)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no header in {FIRST_S:g} s")
            raise AssertionError from None
        if first is None or first.WhichOneof("part") != "header":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a submission starts with its header")
        assert first is not None
        header = first.header
        node = await self._node(header.session, context)
        if header.task_id not in node.tasks and self.answered.verdict(node.client, header.task_id) is None:
            await self._asked.wait()  # a server that is back has not asked anything yet; it may be about to
            node = await self._node(header.session, context)
        each = node.tasks.get(header.task_id)
        if each is None:
            return self._known(node, header.task_id)
        outcome = header.WhichOneof("outcome")
        if outcome == "failure":
            said = header.failure
            return self._take(node, each, Answer(code=said.code or FAILED_CLIENT, reason=said.reason[:1000]))
        if outcome is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "neither an answer nor a failure")
        each.stop_upload()  # an earlier call for the same answer, whose connection was lost
        each.upload = upload = asyncio.ensure_future(self._receive(node, each, header, requests))
        try:
            return await upload
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                upload.cancel()
                raise
            return self._known(node, header.task_id)  # the task ended meanwhile
        except _NotWholeError as error:
            await context.abort(error.status, str(error))
            raise AssertionError from None

    async def _receive(
        self, node: Node, each: Open, header: pb.SubmitHeader, requests: AsyncIterator[pb.SubmitRequest]
    ) -> pb.SubmitResponse:
        """Take an answer's chunks, and the answer if they are what was announced.

        Raises:
            _NotWholeError: it was cut short; the node is to send it again.
        """
        held, receiver = 0, None
        try:
            receiver = Receiver(header.answer, self.settings.max_payload_bytes, folder=self.settings.folder)
            while True:
                async with asyncio.timeout(STALLED_S):
                    request = await anext(aiter(requests), None)
                if request is None:
                    break
                if request.WhichOneof("part") != "data":
                    raise _NotWholeError("a second header", grpc.StatusCode.INVALID_ARGUMENT)
                await self.room.take(each, len(request.data))
                held += len(request.data)
                receiver.add(request.data)
                if (grown := receiver.decoded - held) > 0:
                    self.room.grow(grown)
                    held += grown
                self.counted("received", {"node": node.name, "bytes": str(len(request.data))})
            buffer = receiver.finish()
            taken, held = held, 0  # given back once the answer was read
            return self._take(node, each, Answer(buffer, release=lambda: self._free_later(taken)))
        except DataError as error:
            if receiver is not None and receiver.received < header.answer.size:
                raise _NotWholeError(str(error)) from None
            return self._refuse(node, each, str(error))
        except (TimeoutError, TooSlowError) as error:
            raise _NotWholeError(str(error) or f"nothing came for {STALLED_S:g} s") from None
        except OSError as error:
            log.error("answer not kept", extra={"node": node.name, "client": node.client, "reason": error.strerror})
            raise _NotWholeError(f"no room for it: {error.strerror}", grpc.StatusCode.RESOURCE_EXHAUSTED) from None
        finally:
            if receiver is not None:
                receiver.close()
            await self.room.end(each)
            if held:
                await self.room.free(held)

    async def leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:
        node = await self._node(request.session, context)
        if request.for_good:
            self._shut_out(node, f"its node left: {request.reason[:200]}" if request.reason else "its node left")
            return pb.LeaveResponse()
        log.info("node left", extra={"node": node.name, "client": node.client, "reason": request.reason[:200]})
        self._sessions.pop(node.session, None)
        node.stream += 1
        node.wake.set()
        node.gone_since = time.monotonic()
        self._note_change()
        return pb.LeaveResponse()

    def _known(self, node: Node, name: str) -> pb.SubmitResponse:
        """Return what is to be said of an answer to a task that is not open."""
        verdict = self.answered.verdict(node.client, name)
        if verdict is None:
            return pb.SubmitResponse(verdict=pb.VERDICT_STALE, reason="nobody waits for this task")
        return pb.SubmitResponse(verdict=pb.VERDICT_DUPLICATE if verdict == pb.VERDICT_ACCEPTED else verdict)  # type: ignore[arg-type]

    def _take(self, node: Node, each: Open, answer: Answer, refused: str = "") -> pb.SubmitResponse:
        """End a task with what its node handed in, once."""
        name = each.task.id
        if node.tasks.get(name) is not each:  # closed, or answered by another call, while this one was under way
            answer.release()
            return self._known(node, name)
        del node.tasks[name]
        verdict = pb.VERDICT_REFUSED if refused else pb.VERDICT_ACCEPTED
        self.answered.add(node.client, each.task.cell, name, verdict, counts=answer.buffer is not None)
        said = pb.Verdict.Name(verdict).removeprefix("VERDICT_").lower()
        outcome = said if answer.buffer is not None or refused else "failed"
        about = {"run": self.run, "cell": each.task.cell, "round": each.round, "node": node.name, "client": node.client,
                 "task": name, "kind": each.task.kind, "verdict": outcome}  # fmt: skip
        tasks_log.info("task answered", extra=about)
        self.counted("answer", {"node": node.name, "outcome": outcome})
        self._finish(each, answer)
        return pb.SubmitResponse(verdict=verdict, reason=refused)

    def _refuse(self, node: Node, each: Open, reason: str) -> pb.SubmitResponse:
        """Refuse an answer for good: sending it again would not make it better."""
        log.warning("answer refused", extra={"run": self.run, "node": node.name, "client": node.client,
                                             "task": each.task.id, "reason": reason})  # fmt: skip
        self.counted("refused", {"node": node.name, "reason": "payload"})
        failed = Answer(code=FAILED_CLIENT, reason=f"its answer was not taken: {reason}")
        return self._take(node, each, failed, refused=reason)

    def _free_later(self, size: int) -> None:
        """Give room back, from any thread."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self.room.free(size), self._loop)


class _NotWholeError(Exception):
    """An answer that did not come whole: the node is to send it again."""

    def __init__(self, reason: str, status: grpc.StatusCode = grpc.StatusCode.DATA_LOSS) -> None:
        super().__init__(reason)
        self.status = status


def shown(context: Any) -> Credentials:
    """Return what a caller showed."""
    token = bearer({key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)})
    certificates = context.auth_context().get("x509_pem_cert", ())
    return Credentials(token, certificates[0] if certificates else None)
