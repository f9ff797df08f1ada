"""The server end of the link: a gRPC service on an event loop in a thread of its own.

All its state belongs to that thread; the grid talks to it through ``call``. Who may come in is in ``_grpc_door``, what
becomes of answers in ``_grpc_submissions``; tasks, streams and downloads are here.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from trellis.errors import GridError
from trellis.grids._grpc_door import Door
from trellis.grids._grpc_seats import Seats
from trellis.grids._grpc_submissions import Submissions
from trellis.grids._grpc_tasks import FAILED_WORKER, Answer, Answered, Node, Open, Payloads, references
from trellis.grids._grpc_uploads import Room
from trellis.runs import SEATS
from trellis.wire import methods
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.nodes import AllowList
from trellis.wire.payload import chunks

log = logging.getLogger("trellis.link")

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
        nodes: those that joined, by client; ``sessions`` and ``names`` hold the same.
        setups: what nodes need before their first task of a cell, encoded, by digest.
        changed: notified when a node comes or goes.
        none_since: monotonic time since which no node is connected; None while one is.
        asked: set once the server asked anything of anybody.

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
        self.sessions: dict[str, Node] = {}
        self.names: dict[str, Node] = {}
        self.started = time.monotonic()
        self.asked: asyncio.Event
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

    def soon(self, work: Coroutine[Any, Any, None]) -> None:
        """Have something done on the link's thread, from any thread, without waiting for it."""
        if self._loop.is_closed():
            work.close()
        else:
            asyncio.run_coroutine_threadsafe(work, self._loop)

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
        self.room, self.asked = Room(self.settings.uploads_bytes), asyncio.Event()
        self._server = grpc.aio.server(options=methods.SERVER_OPTIONS)
        calls = {
            "Join": Door(self).join,
            "Work": self.work,
            "Fetch": self.fetch,
            "Submit": Submissions(self).submit,
            "Leave": self.leave,
        }
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
                self.finish(each, Answer(code=FAILED_WORKER, reason="no node is this client"))
                continue
            after = self.answered.after(each.client, each.task.cell)
            if after is not None and not node.tasks:  # of two questions at once the second starts where the first ends
                each.task.after = after
            node.tasks[each.task.id] = each
            if each.task.id in node.cancelled:  # closed a moment ago, and asked again before the node heard of it
                node.cancelled.remove(each.task.id)
            node.wake.set()
        self.seats.save()  # before anybody's state depends on it
        if not self.asked.is_set():
            self.asked.set()
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
        self.finish(each, answer)

    def finish(self, each: Open, answer: Answer) -> None:
        """Close a task that is in no node's list any more, and let go of what it refers to."""
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

    def note_change(self) -> None:
        """Tell those who wait that a node came or went."""
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
            self.fail_tasks(node, f"its node has been gone for {self.settings.leave_after_s:g} s")
        allow = self.settings.allow
        if allow is not None and (reason := allow.objection(node.name, node.credential, node.client)):
            self.shut_out(node, reason)

    def fail_tasks(self, node: Node, reason: str) -> None:
        """End all tasks of a node without an answer."""
        for name in list(node.tasks):
            self._cancel(node, name, Answer(code=FAILED_WORKER, reason=reason))

    def shut_out(self, node: Node, reason: str) -> None:
        """Forget a node, end its session and fail its tasks."""
        log.warning("node shut out", extra={"node": node.name, "client": node.client, "reason": reason})
        self.sessions.pop(node.session, None)
        if self.nodes.get(node.client) is node:
            del self.nodes[node.client]
        if self.names.get(node.name) is node:
            del self.names[node.name]
        self.fail_tasks(node, reason)
        node.stream += 1
        node.wake.set()
        self.counted("shut-out", {"node": node.name})
        self.note_change()

    # -- the calls --------------------------------------------------------------------------------------

    async def node_of(self, session: str, context: Any) -> Node:
        """Return whose session it is, or end the call."""
        node = self.sessions.get(session)
        if node is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such session: join again")
        assert node is not None
        return node

    async def work(self, request: pb.WorkRequest, context: Any) -> AsyncIterator[pb.WorkResponse]:
        node = await self.node_of(request.session, context)
        node.stream += 1
        mine, sent, new = node.stream, dict[str, Open](), True
        node.gone_since = None
        node.cancelled.clear()
        self.note_change()
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
                if new and self.asked.is_set():
                    new = False
                    yield pb.WorkResponse(beat=pb.Beat(complete=True))
                if node.wake.is_set():
                    continue
                try:
                    await asyncio.wait_for(node.wake.wait(), self.settings.beat_s)
                except TimeoutError:
                    whole = self.asked.is_set() and not node.wake.is_set()
                    yield pb.WorkResponse(beat=pb.Beat(complete=whole))
            if self._closing is not None:
                yield pb.WorkResponse(goodbye=self._closing)
        finally:
            if node.stream == mine:
                node.gone_since = time.monotonic()
                self.note_change()

    async def fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.FetchResponse]:
        node = await self.node_of(request.session, context)
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

    async def leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:
        node = await self.node_of(request.session, context)
        if request.for_good:
            self.shut_out(node, f"its node left: {request.reason[:200]}" if request.reason else "its node left")
            return pb.LeaveResponse()
        log.info("node left", extra={"node": node.name, "client": node.client, "reason": request.reason[:200]})
        self.sessions.pop(node.session, None)
        node.stream += 1
        node.wake.set()
        node.gone_since = time.monotonic()
        self.note_change()
        return pb.LeaveResponse()
