"""The server end of the link: a gRPC service on an event loop in a thread of its own.

All its state belongs to that thread; the grid talks to it through ``call``. Back-pressure: an upload waits before its
first chunk until there is room for it, and gRPC's flow control keeps the node from sending on.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from trellis.errors import DataError, GridError
from trellis.grids._grpc_tasks import Answer, Node, Open, Payloads, Recent, references
from trellis.wire import methods
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.nodes import NAME, AllowList, Credentials, RefusedError, bearer
from trellis.wire.payload import CHUNK, Receiver, chunks

log = logging.getLogger("trellis.link")

FAILED_CLIENT, FAILED_WORKER = 2, 8
"""Codes of a failure, as in ``trellis.flower``, which this file could do without."""


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
        uploads_bytes: answers that may be under way or wait to be read, together; one always may.
        keep_answers: how many answers a node keeps in case the server loses them.
    """

    address: str = "127.0.0.1:0"
    credentials: grpc.ServerCredentials | None = None
    allow: AllowList | None = None
    beat_s: float = 10.0
    leave_after_s: float = 30.0
    give_up_after_s: float = 300.0
    max_payload_bytes: int = 2_000_000_000
    uploads_bytes: int = 1_000_000_000
    keep_answers: int = 8


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
        self._sessions: dict[str, Node] = {}
        self._answered: defaultdict[int, Recent] = defaultdict(Recent)
        self._room: asyncio.Condition
        self._uploads = 0
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
        self._room = asyncio.Condition()
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
            node.tasks[each.task.id] = each
            node.wake.set()

    def close_task(self, client: int, name: str, answer: Answer) -> None:
        """End a task without its node: too late, or the caller wants no more. The node is told."""
        node = self.nodes.get(client)
        each = node.tasks.pop(name, None) if node else None
        if node is not None and each is not None:
            node.cancelled.append(name)
            node.wake.set()
            self._finish(each, answer)

    def _finish(self, each: Open, answer: Answer) -> None:
        for digest in references(each.task):
            self.payloads.drop(digest)
        each.close(answer)

    def _present(self) -> list[int]:
        now = time.monotonic()
        return sorted(
            client
            for client, node in self.nodes.items()
            if node.gone_since is None or now - node.gone_since < self.settings.leave_after_s
        )

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
            now = time.monotonic()
            for node in list(self.nodes.values()):
                if node.gone_since is not None and now - node.gone_since >= self.settings.leave_after_s:
                    self._fail_tasks(node, f"its node has been gone for {self.settings.leave_after_s:g} s")
                if self.settings.allow is not None and not self.settings.allow.still(node.name):
                    self._shut_out(node, "its credentials were revoked or have expired")

    def _fail_tasks(self, node: Node, reason: str) -> None:
        for name, each in list(node.tasks.items()):
            del node.tasks[name]
            self._finish(each, Answer(code=FAILED_WORKER, reason=reason))

    def _shut_out(self, node: Node, reason: str) -> None:
        log.warning("node shut out", extra={"node": node.name, "client": node.client, "reason": reason})
        self._sessions.pop(node.session, None)
        self.nodes.pop(node.client, None)
        self._fail_tasks(node, reason)
        node.stream += 1
        node.wake.set()
        self.counted("shut-out", {"node": node.name})
        self._note_change()

    # -- the calls --------------------------------------------------------------------------------------

    async def join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        name, client = await self._identify(request, context)
        if request.protocol != methods.PROTOCOL:
            said = f"protocol {request.protocol}; this server speaks {methods.PROTOCOL}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, said)
        before = next((node for node in self.nodes.values() if node.name == name), None)
        if before and before.connected and before.instance != request.instance:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"node {name!r} is connected from somewhere else")
        client = await self._place(request, context, name, before, client)
        node = Node(name, request.instance, client, secrets.token_hex(16), request.kind)
        if before is not None:
            self._sessions.pop(before.session, None)
            before.stream += 1
            before.wake.set()
            self.nodes.pop(before.client, None)
            node.tasks = before.tasks if before.client == client else {}
        self.nodes[client] = node
        self._sessions[node.session] = node
        log.info("node joined", extra={"node": name, "client": client, "software": dict(request.software)})
        self.counted("join", {"node": name})
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

    async def _identify(self, request: pb.JoinRequest, context: Any) -> tuple[str, int | None]:
        """Return the caller's name and the client that the allow-list makes it, or end the call."""
        import re

        if self.settings.allow is None:
            if not re.match(NAME, request.node):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a node's name is like {NAME}")
            return request.node, None
        try:
            name, entry = self.settings.allow.identify(shown(context))
        except RefusedError as error:
            log.warning("node refused", extra={"peer": context.peer(), "reason": str(error)})
            self.counted("refused", {"reason": "credentials"})
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            raise AssertionError from None
        if request.node not in ("", name):
            said = f"these credentials are of node {name!r}, not {request.node!r}"
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, said)
        return name, entry.client

    async def _place(
        self, request: pb.JoinRequest, context: Any, name: str, before: Node | None, given: int | None
    ) -> int:
        """Return which client the node is: as the allow-list says, else as it asks, else as before, else a free one."""
        asked = request.client if request.HasField("client") else None
        if given is not None and asked not in (None, given):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"node {name!r} is client {given}, not {asked}")
        client = given if given is not None else asked
        if client is None and before is not None:
            return before.client
        taken = {number for number, node in self.nodes.items() if node is not before}
        if client is None:
            client = next((number for number in range(self.num_clients) if number not in taken), None)
            if client is None:
                said = f"all {self.num_clients} clients have their node"
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, said)
        assert client is not None
        if client >= self.num_clients:
            said = f"client {client} of a federation of {self.num_clients}"
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, said)
        if client in taken:
            if self.nodes[client].connected:
                said = f"client {client} is node {self.nodes[client].name!r}"
                await context.abort(grpc.StatusCode.ALREADY_EXISTS, said)
            self._shut_out(self.nodes[client], "another node took its place")
        return client

    async def _node(self, session: str, context: Any) -> Node:
        node = self._sessions.get(session)
        if node is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such session: join again")
        assert node is not None
        return node

    async def work(self, request: pb.WorkRequest, context: Any) -> AsyncIterator[pb.WorkResponse]:
        node = await self._node(request.session, context)
        node.stream += 1
        mine, sent = node.stream, set[str]()
        node.gone_since = None
        node.cancelled.clear()
        self._note_change()
        try:
            while node.stream == mine and self._closing is None:
                node.wake.clear()
                sent &= node.tasks.keys()
                for name, each in list(node.tasks.items()):
                    if name not in sent and name in node.tasks:
                        sent.add(name)
                        yield pb.WorkResponse(task=each.on_wire())
                while node.cancelled:
                    yield pb.WorkResponse(cancel=pb.Cancel(task_id=node.cancelled.pop()))
                if node.wake.is_set():
                    continue
                try:
                    await asyncio.wait_for(node.wake.wait(), self.settings.beat_s)
                except TimeoutError:
                    yield pb.WorkResponse(beat=pb.Beat())
            if self._closing is not None:
                yield pb.WorkResponse(goodbye=self._closing)
        finally:
            if node.stream == mine:
                node.gone_since = time.monotonic()
                self._note_change()

    async def fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.FetchResponse]:
        node = await self._node(request.session, context)
        data = self.payloads.get(request.digest) or self.setups.get(request.digest)
        if data is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no task that is open refers to this payload")
            raise AssertionError
        if request.offset > len(data):
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, f"offset {request.offset} of {len(data)} bytes")
        for chunk in chunks(data, request.offset):
            yield pb.FetchResponse(data=chunk)
        self.counted("sent", {"node": node.name, "bytes": str(len(data) - request.offset)})

    async def submit(self, requests: AsyncIterator[pb.SubmitRequest], context: Any) -> pb.SubmitResponse:
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("part") != "header":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a submission starts with its header")
        assert first is not None
        header = first.header
        node = await self._node(header.session, context)
        if header.task_id in self._answered[node.client]:
            return pb.SubmitResponse(verdict=pb.VERDICT_DUPLICATE)
        if header.task_id not in node.tasks:
            return pb.SubmitResponse(verdict=pb.VERDICT_STALE, reason="nobody waits for this task")
        outcome = header.WhichOneof("outcome")
        if outcome == "failure":
            said = header.failure
            return self._take(node, header.task_id, Answer(code=said.code or FAILED_CLIENT, reason=said.reason[:1000]))
        if outcome is None:
            return self._refuse(node, "neither an answer nor a failure")
        try:
            receiver = Receiver(header.answer, self.settings.max_payload_bytes)
        except DataError as error:
            return self._fail(node, header.task_id, error)
        size = max(header.answer.size, header.answer.decoded_size)
        await self._reserve(size)
        kept = False
        try:
            async for request in requests:
                if request.WhichOneof("part") != "data":
                    return self._refuse(node, "a second header")
                receiver.add(request.data)
            buffer = receiver.finish()
            verdict = self._take(node, header.task_id, Answer(buffer, release=lambda: self._free_later(size)))
            kept = verdict.verdict == pb.VERDICT_ACCEPTED
            self.counted("received", {"node": node.name, "bytes": str(header.answer.size)})
            return verdict
        except DataError as error:
            if receiver.received < header.answer.size:
                return self._refuse(node, str(error))  # cut short on its way: the node sends it again
            return self._fail(node, header.task_id, error)
        finally:
            receiver.close()
            if not kept:
                await self._free(size)

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

    def _take(self, node: Node, name: str, answer: Answer) -> pb.SubmitResponse:
        each = node.tasks.pop(name, None)
        if each is None:  # closed, or answered by another call, while this one was under way
            duplicate = name in self._answered[node.client]
            return pb.SubmitResponse(verdict=pb.VERDICT_DUPLICATE if duplicate else pb.VERDICT_STALE)
        self._answered[node.client].add(name)
        self._finish(each, answer)
        return pb.SubmitResponse(verdict=pb.VERDICT_ACCEPTED)

    def _fail(self, node: Node, name: str, error: DataError) -> pb.SubmitResponse:
        """Refuse an answer for good: sending it again would not make it better."""
        verdict = self._take(node, name, Answer(code=FAILED_CLIENT, reason=f"its answer was not taken: {error}"))
        if verdict.verdict != pb.VERDICT_ACCEPTED:
            return verdict
        return self._refuse(node, str(error))

    def _refuse(self, node: Node, reason: str) -> pb.SubmitResponse:
        log.warning("answer refused", extra={"node": node.name, "client": node.client, "reason": reason})
        self.counted("refused", {"reason": "payload"})
        return pb.SubmitResponse(verdict=pb.VERDICT_REFUSED, reason=reason)

    async def _reserve(self, size: int) -> None:
        async with self._room:
            await self._room.wait_for(lambda: self._uploads == 0 or self._uploads + size <= self.settings.uploads_bytes)
            self._uploads += size

    async def _free(self, size: int) -> None:
        async with self._room:
            self._uploads -= size
            self._room.notify_all()

    def _free_later(self, size: int) -> None:
        """Give room back, from any thread."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._free(size), self._loop)


def shown(context: Any) -> Credentials:
    """Return what a caller showed."""
    token = bearer({key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)})
    certificates = context.auth_context().get("x509_pem_cert", ())
    return Credentials(token, certificates[0] if certificates else None)
