"""The calls of the link as gRPC knows them: paths, message types, options. Stands in for generated stubs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import grpc

from trellis.wire.generated import link_pb2 as pb

SERVICE = "trellis.v1.LinkService"
PROTOCOL = 1

CALLS: dict[str, tuple[str, Any, Any]] = {
    "Join": ("unary_unary", pb.JoinRequest, pb.JoinResponse),
    "Work": ("unary_stream", pb.WorkRequest, pb.WorkResponse),
    "Fetch": ("unary_stream", pb.FetchRequest, pb.FetchResponse),
    "Submit": ("stream_unary", pb.SubmitRequest, pb.SubmitResponse),
    "Leave": ("unary_unary", pb.LeaveRequest, pb.LeaveResponse),
}

MAX_MESSAGE = 4_000_000
"""The largest single message on either side; payloads come in chunks far below it."""

KEEPALIVE = [
    # A ping every ten seconds tells within fifteen that the other machine or the way to it is gone. A stopped
    # process does not answer pings either.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    # A node pauses between its tries by itself; gRPC's own pause comes on top of that.
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
]
SERVER_OPTIONS = [
    *KEEPALIVE,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),  # two servers on one port would each get half of the nodes
    ("grpc.max_metadata_size", 16_384),
    ("grpc.max_concurrent_streams", 100),  # of one connection; a node has a handful
]


def handlers(behaviours: Mapping[str, Callable[..., Any]]) -> grpc.GenericRpcHandler:
    """Return the service's handlers from one function per call, by the call's name."""
    table = {
        name: getattr(grpc, f"{shape}_rpc_method_handler")(
            behaviours[name],
            request_deserializer=request.FromString,
            response_serializer=response.SerializeToString,
        )
        for name, (shape, request, response) in CALLS.items()
    }
    return grpc.method_handlers_generic_handler(SERVICE, table)


def stubs(channel: Any) -> dict[str, Any]:
    """Return the calls on a channel, by name. The channel may be a plain or an asyncio one."""
    return {
        name: getattr(channel, shape)(
            f"/{SERVICE}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        for name, (shape, request, response) in CALLS.items()
    }
