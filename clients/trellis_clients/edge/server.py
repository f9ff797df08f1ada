"""The gRPC server of a device: inference, standard health service, reflection, and metrics over HTTP beside it."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from trellis.errors import GridError
from trellis_clients.edge import metrics
from trellis_clients.edge.housekeeping import Housekeeper
from trellis_clients.edge.runtime import Runtime
from trellis_clients.edge.service import SERVICE, InferenceService

log = logging.getLogger("trellis.edge")

SPARE = 4
"""Threads beside those that batches may hold: health and metadata are answered while all batches wait."""

WATCHERS = 16
"""Calls beyond those with a thread: health watches. What is more is refused, which bounds memory for requests."""

SLACK = 65536
"""Bytes of a request beside its batch."""


@dataclass(frozen=True)
class Address:
    """Where the server listens, and its limits.

    Attributes:
        grpc: ``host:port``, port 0 for a free one, or ``unix:/path``.
        metrics: ``host:port`` for HTTP; None for none.
        request_bytes: longest request; None: the largest batch in the widest datatype, and some slack.
        request_seconds: longest a batch may wait.
        reflection: whether tools may ask for the protocol.
    """

    grpc: str = "127.0.0.1:8001"
    metrics: str | None = "127.0.0.1:8002"
    request_bytes: int | None = None
    request_seconds: float = 30.0
    reflection: bool = True


class EdgeServer:
    """A runtime on the network. ``start``, then ``stop``; both may be called once.

    Args:
        runtime: what answers.
        address: where.
        keeper: what saves state and takes in new files meanwhile; started and stopped with the server.
    """

    def __init__(self, runtime: Runtime, address: Address | None = None, keeper: Housekeeper | None = None) -> None:
        self.runtime = runtime
        self.address = address = address or Address()
        self.keeper = keeper
        self.service = InferenceService(runtime, address.request_seconds)
        workers = runtime.turnstile.most + SPARE
        longest = address.request_bytes or runtime.live.expected.bytes_of_a_batch + SLACK
        self._server = grpc.server(
            ThreadPoolExecutor(workers, thread_name_prefix="edge"),
            handlers=[self.service.handlers()],
            maximum_concurrent_rpcs=workers + WATCHERS,
            options=[
                ("grpc.max_receive_message_length", longest),
                ("grpc.max_metadata_size", 16384),
                ("grpc.so_reuseport", 0),  # otherwise a second server on the port starts, and gets half the calls
            ],
        )
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        if address.reflection:
            _reflect(self._server)
        self._metrics: Any = None
        self.where = self.metrics_where = ""

    def start(self) -> None:
        """Listen. ``where`` and ``metrics_where`` then say where.

        Raises:
            GridError: an address is taken, or is none.
        """
        self.where = self._listen(self.address.grpc)
        if self.address.metrics is not None:
            host, port = host_and_port(self.address.metrics)
            try:
                self._metrics, _ = metrics.serve(self.runtime.metrics, host, port)
            except (OSError, OverflowError) as error:
                self._server.stop(None)
                raise GridError("edge-address", f"metrics cannot listen on {self.address.metrics!r}: {error}") from None
            self.metrics_where = f"http://{host}:{self._metrics.server_port}/metrics"
        self._server.start()
        if self.keeper is not None:
            self.keeper.start()
        for name in ("", SERVICE.full_name):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace: float = 10.0) -> None:
        """Say NOT_SERVING, let what is being answered end within ``grace`` seconds, save the state."""
        self.service.stopping = True
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()
        if self.keeper is not None:
            self.keeper.stop()
        self.runtime.save(max(grace, 1.0))
        if self._metrics is not None:
            self._metrics.shutdown()
            self._metrics.server_close()

    def _listen(self, address: str) -> str:
        if not address.startswith("unix:"):
            host, port = host_and_port(address)
            if host not in ("localhost", "::1", "[::1]") and not host.startswith("127."):
                log.warning(
                    "%s is reachable from outside this machine, unencrypted and without authentication", address
                )
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if not port:
            raise GridError(
                "edge-address", f"cannot listen on {address!r}: is it taken, or no address of this machine?"
            )
        return address if address.startswith("unix:") else f"{host}:{port}"


def host_and_port(address: str) -> tuple[str, int]:
    """Return the parts of ``host:port``.

    Raises:
        GridError: it is not of that form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise GridError("edge-address", f"{address!r} is not host:port, e.g. 127.0.0.1:8001")
    return host, int(port)


def _reflect(server: grpc.Server) -> None:
    """Add the reflection service. The protocol's messages are in a pool of their own, and health joins them there."""
    from grpc_reflection.v1alpha import reflection, reflection_pb2

    pool = SERVICE.file.pool
    for each in (health_pb2, reflection_pb2):
        pool.AddSerializedFile(each.DESCRIPTOR.serialized_pb)
    names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, pool)
