"""Who comes in: a node's credentials, its name, and which client of the federation it is."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import TYPE_CHECKING, Any

import grpc

from trellis.grids._grpc_tasks import Node
from trellis.wire import methods
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.nodes import NAME, Credentials, RefusedError, bearer
from trellis.wire.payload import CHUNK

if TYPE_CHECKING:
    from trellis.grids._grpc_link import Link

log = logging.getLogger("trellis.link")


class Door:
    """The call Join. Belongs to the link's thread."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        """Let a node in, or end the call with the reason why not. What it had open before is its own again."""
        name, credential, given = await self._identify(request, context)
        if request.protocol != methods.PROTOCOL:
            said = f"protocol {request.protocol}; this server speaks {methods.PROTOCOL}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, said)
        before = self._link.names.get(name)
        if before and before.connected and before.instance != request.instance:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"node {name!r} is connected from somewhere else")
        client = await self._place(request, context, name, before, given)
        node = Node(name, request.instance, client, secrets.token_hex(16), request.kind, credential)
        if before is not None:
            self._link.sessions.pop(before.session, None)
            before.stream += 1
            before.wake.set()
            self._link.nodes.pop(before.client, None)
            if before.client == client:
                node.tasks = before.tasks
            else:
                self._link.fail_tasks(before, f"its node is client {client} from now on")
        self._link.nodes[client] = self._link.names[name] = self._link.sessions[node.session] = node
        self._link.seats.give(request.instance, client)
        software = {key[:40]: value[:40] for key, value in list(request.software.items())[:10]}
        log.info("node joined", extra={"run": self._link.run, "node": name, "client": client, "software": software})
        self._link.counted("join", {"node": name})
        if self._link.none_since is None:  # it may have been the only one that was connected
            self._link.note_change()
        s = self._link.settings
        return pb.JoinResponse(
            session=node.session,
            client=client,
            num_clients=self._link.num_clients,
            run=self._link.run,
            max_payload_bytes=s.max_payload_bytes,
            chunk_bytes=CHUNK,
            beat_seconds=s.beat_s,
            keep_answers=s.keep_answers,
        )

    async def _identify(self, request: pb.JoinRequest, context: Any) -> tuple[str, str | None, int | None]:
        """Return the caller's name, the digest of what it showed, and its client by the allow-list; or end the call."""
        if self._link.settings.allow is None:
            if not re.match(NAME, request.node):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a node's name is like {NAME}")
            return request.node, None, None
        try:
            name, entry, credential = self._link.settings.allow.identify(shown(context))
        except RefusedError as error:
            log.warning("node refused", extra={"run": self._link.run, "peer": context.peer(), "reason": str(error)})
            self._link.counted("refused", {"node": "", "reason": "credentials"})
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
        others = self._link.settings.allow.reserved(name) if self._link.settings.allow else set()
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
                said = f"all {self._link.num_clients} clients have their node"
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, said)
        assert client is not None
        if client >= self._link.num_clients:
            said = f"client {client} of a federation of {self._link.num_clients}"
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, said)
        other = self._link.nodes.get(client)
        if other is not None and other is not before:
            if given is None and not other.absent_for(self._link.settings.leave_after_s):
                said = f"client {client} is node {other.name!r}"
                await context.abort(grpc.StatusCode.ALREADY_EXISTS, said)
            self._link.shut_out(other, "another node took its place")
        return client

    def _free_seat(self, instance: str, before: Node | None, others: set[int]) -> int | None:
        """Return which client a node without a wish may be; not one that the allow-list gives to others."""
        sitting = {node.client: node for node in self._link.nodes.values() if node is not before}
        away = {client for client, node in sitting.items() if node.absent_for(self._link.settings.leave_after_s)}
        early = time.monotonic() - self._link.started < self._link.settings.leave_after_s
        return self._link.seats.free(instance, sitting.keys() | others, away - others, strict=early)


def shown(context: Any) -> Credentials:
    """Return what a caller showed."""
    token = bearer({key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)})
    certificates = context.auth_context().get("x509_pem_cert", ())
    return Credentials(token, certificates[0] if certificates else None)
