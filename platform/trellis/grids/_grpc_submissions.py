"""Answers as they come in: each is taken once, whole, and only while somebody waits for it.

Back-pressure: a chunk waits until there is room for it, and gRPC's flow control keeps the node from sending on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from trellis.errors import DataError
from trellis.grids._grpc_tasks import FAILED_CLIENT, Answer, Node, Open
from trellis.grids._grpc_uploads import FIRST_S, STALLED_S, TooSlowError
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.payload import Receiver

if TYPE_CHECKING:
    from trellis.grids._grpc_link import Link

log = logging.getLogger("trellis.link")
tasks_log = logging.getLogger("trellis.link.tasks")


class Submissions:
    """The call Submit. Belongs to the link's thread."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def submit(self, requests: AsyncIterator[pb.SubmitRequest], context: Any) -> pb.SubmitResponse:
        """Take an answer, or what there is to say in place of one."""
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
        node = await self._link.node_of(header.session, context)
        if header.task_id not in node.tasks and self._link.answered.verdict(node.client, header.task_id) is None:
            await self._link.asked.wait()  # a server that is back has not asked anything yet; it may be about to
            node = await self._link.node_of(header.session, context)
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
            receiver = Receiver(header.answer, self._link.settings.max_payload_bytes, folder=self._link.settings.folder)
            while True:
                async with asyncio.timeout(STALLED_S):
                    request = await anext(aiter(requests), None)
                if request is None:
                    break
                if request.WhichOneof("part") != "data":
                    raise _NotWholeError("a second header", grpc.StatusCode.INVALID_ARGUMENT)
                await self._link.room.take(each, len(request.data))
                held += len(request.data)
                receiver.add(request.data)
                if (grown := receiver.decoded - held) > 0:
                    self._link.room.grow(grown)
                    held += grown
                self._link.counted("received", {"node": node.name, "bytes": str(len(request.data))})
            buffer = receiver.finish()
            whole, held = held, 0  # given back once the answer was read
            room = self._link.room
            room.keep(whole)
            return self._take(node, each, Answer(buffer, release=lambda: self._link.soon(room.read(whole))))
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
            await self._link.room.end(each)
            if held:
                await self._link.room.free(held)

    def _known(self, node: Node, name: str) -> pb.SubmitResponse:
        """Return what is to be said of an answer to a task that is not open."""
        verdict = self._link.answered.verdict(node.client, name)
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
        self._link.answered.add(node.client, each.task.cell, name, verdict, counts=answer.buffer is not None)
        said = pb.Verdict.Name(verdict).removeprefix("VERDICT_").lower()
        outcome = said if answer.buffer is not None or refused else "failed"
        about = {"run": self._link.run, "cell": each.task.cell, "round": each.round, "node": node.name,
                 "client": node.client, "task": name, "kind": each.task.kind, "verdict": outcome}  # fmt: skip
        tasks_log.info("task answered", extra=about)
        self._link.counted("answer", {"node": node.name, "outcome": outcome})
        self._link.finish(each, answer)
        return pb.SubmitResponse(verdict=verdict, reason=refused)

    def _refuse(self, node: Node, each: Open, reason: str) -> pb.SubmitResponse:
        """Refuse an answer for good: sending it again would not make it better."""
        log.warning("answer refused", extra={"run": self._link.run, "node": node.name, "client": node.client,
                                             "task": each.task.id, "reason": reason})  # fmt: skip
        self._link.counted("refused", {"node": node.name, "reason": "payload"})
        failed = Answer(code=FAILED_CLIENT, reason=f"its answer was not taken: {reason}")
        return self._take(node, each, failed, refused=reason)


class _NotWholeError(Exception):
    """An answer that did not come whole: the node is to send it again."""

    def __init__(self, reason: str, status: grpc.StatusCode = grpc.StatusCode.DATA_LOSS) -> None:
        super().__init__(reason)
        self.status = status
