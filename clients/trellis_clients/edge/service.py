"""The six calls of the Open Inference Protocol."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode

import trellis
from trellis.errors import TrellisError
from trellis_clients.edge.decode import RequestError, decode, invalid, parse, shown
from trellis_clients.edge.encode import OUTPUTS, encode, wanted
from trellis_clients.edge.generated import open_inference_pb2 as oip
from trellis_clients.edge.runtime import Live, Runtime
from trellis_clients.edge.turnstile import QueueFullError, Ticket

log = logging.getLogger("trellis.edge")

SERVICE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"]


class InferenceService:
    """Answers calls from a runtime.

    Args:
        runtime: what answers.
        seconds: longest a batch may wait for its turn, also where its caller gave no deadline.
    """

    def __init__(self, runtime: Runtime, seconds: float = 30.0) -> None:
        self.runtime = runtime
        self.seconds = seconds
        self.stopping = False

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service for a gRPC server.

        Messages arrive as bytes and are parsed here: gRPC's own answer to bytes that do not parse is INTERNAL, as if
        the server were at fault, and a traceback in the log for each.
        """
        return grpc.method_handlers_generic_handler(
            SERVICE.full_name,
            {
                method.name: grpc.unary_unary_rpc_method_handler(
                    self._call(method.name, GetMessageClass(method.input_type))
                )
                for method in SERVICE.methods
            },
        )

    def _call(self, name: str, kind: type[Message]) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        answer: Callable[[Any, grpc.ServicerContext], Message] = getattr(self, name)
        metrics = self.runtime.metrics

        def call(data: bytes, context: grpc.ServicerContext) -> bytes:
            started = time.perf_counter()
            code, message, response = StatusCode.OK, "", b""
            try:
                response = answer(data if name == "ModelInfer" else _message(kind, data), context).SerializeToString()
            except RequestError as error:
                code, message = error.code, error.message
            except TrellisError as error:
                code, message = StatusCode.INTERNAL, str(error)
                log.error("%s: %s", name, error)
            except Exception as error:
                code, message = StatusCode.INTERNAL, f"the server failed: {type(error).__name__}"
                log.exception("%s failed", name)
            metrics.seconds.labels(name).observe(time.perf_counter() - started)
            metrics.requests.labels(name, code.name).inc()
            if code is not StatusCode.OK:
                context.abort(code, message[:1000])  # a status travels in a header
            return response

        return call

    # -- health and metadata --------------------------------------------------------------------------

    def ServerLive(self, request: oip.ServerLiveRequest, context: grpc.ServicerContext) -> oip.ServerLiveResponse:  # noqa: ARG002, N802
        return oip.ServerLiveResponse(live=True)

    def ServerReady(self, request: oip.ServerReadyRequest, context: grpc.ServicerContext) -> oip.ServerReadyResponse:  # noqa: ARG002, N802
        return oip.ServerReadyResponse(ready=not self.stopping)

    def ModelReady(self, request: oip.ModelReadyRequest, context: grpc.ServicerContext) -> oip.ModelReadyResponse:  # noqa: ARG002, N802
        self._named(request.name, request.version)
        return oip.ModelReadyResponse(ready=not self.stopping)

    def ServerMetadata(  # noqa: N802
        self,
        request: oip.ServerMetadataRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> oip.ServerMetadataResponse:
        return oip.ServerMetadataResponse(
            name="trellis-edge", version=trellis.__version__, extensions=["classification"]
        )

    def ModelMetadata(  # noqa: N802
        self,
        request: oip.ModelMetadataRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> oip.ModelMetadataResponse:
        live = self._named(request.name, request.version)
        response = oip.ModelMetadataResponse(name=live.model.name, versions=[str(live.version)], platform="onnx_onnxv1")
        response.inputs.add(name=live.expected.name, datatype="FP32", shape=[-1, *live.expected.shape])
        for name, datatype in OUTPUTS.items():
            shape = [-1] if name == "labels" else [-1, len(live.model.predictor.classes)]
            response.outputs.add(name=name, datatype=datatype, shape=shape)
        return response

    # -- inference ------------------------------------------------------------------------------------

    def ModelInfer(self, data: bytes, context: grpc.ServicerContext) -> oip.ModelInferResponse:  # noqa: N802
        """Answer one batch, in its turn. It is checked before, so that a wrong one holds nobody up."""
        try:
            ticket = self.runtime.turnstile.ticket()
        except QueueFullError:
            raise RequestError(
                StatusCode.RESOURCE_EXHAUSTED,
                f"{self.runtime.turnstile.most} batches are waiting already; try again later",
            ) from None
        self.runtime.metrics.waiting.set(len(self.runtime.turnstile))
        try:
            request = parse(data)
            live = self._named(request.model_name, request.model_version)
            asked, x = wanted(request), decode(request, live.expected)
            self._wait(ticket, context)
            if self.runtime.live.model is not live.model:  # swapped while this waited: preprocessing may differ
                live = self._named(request.model_name, request.model_version)
                x = decode(request, live.expected)
            answer = self.runtime.predict(x)
        finally:
            ticket.end()
        live = answer.live
        response = encode(request, asked, answer.logits, answer.probabilities, live.model.predictor.classes)
        response.model_name, response.model_version = live.model.name, str(live.version)
        response.parameters["affine_version"].int64_param = live.affine_version
        return response

    def _wait(self, ticket: Ticket, context: grpc.ServicerContext) -> None:
        """Wait for the turn for as long as anybody waits for the answer."""
        left = context.time_remaining()
        seconds = self.seconds if left is None else min(left, self.seconds)
        if not context.add_callback(ticket.give_up):
            raise RequestError(StatusCode.CANCELLED, "the caller has gone")
        in_time = ticket.wait(seconds)
        left = context.time_remaining()
        if not in_time or (left is not None and left <= 0):
            if not context.is_active() and (left is None or left > 0):
                raise RequestError(StatusCode.CANCELLED, "the caller has gone")
            raise RequestError(StatusCode.DEADLINE_EXCEEDED, f"the batch's turn did not come within {seconds:.3g} s")

    def _named(self, name: str, version: str) -> Live:
        """Return what serves a model's name and version."""
        live = self.runtime.live
        if not name:
            raise invalid(f"the request names no model; {live.model.name!r} is served")
        if name != live.model.name:
            raise RequestError(StatusCode.NOT_FOUND, f"no model is named {shown(name)}; {live.model.name!r} is served")
        if version not in ("", str(live.version)):
            raise RequestError(
                StatusCode.NOT_FOUND, f"model {name!r} has no version {shown(version)}; {str(live.version)!r} is served"
            )
        return live


def _message(kind: type[Message], data: bytes) -> Message:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise invalid(f"the request is not a {kind.DESCRIPTOR.name}: its bytes do not parse") from None
