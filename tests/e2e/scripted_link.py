"""A server of the link that does what a test tells it to, call by call, and the tasks that it sends."""

from __future__ import annotations

import hashlib
import json
import queue
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from deployment import SCENARIO
from federations import write
from trellis import scenario
from trellis.wire import methods
from trellis.wire.content import Record, pack
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.payload import encode


class Script:
    """The server. What is not scripted goes well: payloads are there, answers count.

    Attributes:
        opened: streams of nodes, in order; put events on them, and None to end one.
        submit, fetch: what happens to the next calls, in order; each takes request and context.
        answers: headers and bytes of what was handed in whole.
        fetched: offsets that were asked for.
    """

    def __init__(self, port: int = 0, **welcome: Any) -> None:
        self.welcome = {
            "client": 0,
            "num_clients": 1,
            "run": "a-run",
            "beat_seconds": 60.0,
            "keep_answers": 8,
        } | welcome
        self.opened: queue.Queue[queue.Queue[Any]] = queue.Queue()
        self.submit: deque[Callable[[Any, Any], Any]] = deque()
        self.fetch: deque[Callable[[Any, Any], Any]] = deque()
        self.payloads: dict[str, bytes] = {}
        self.answers: list[tuple[pb.SubmitHeader, bytes]] = []
        self.fetched: list[int] = []
        self.joins = self.left = 0
        self.on_leave: Callable[[], Any] = lambda: None
        self._server = grpc.server(ThreadPoolExecutor(16), options=methods.SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers(
            (
                methods.handlers(
                    {
                        "Join": self._join,
                        "Work": self._work,
                        "Fetch": self._fetch,
                        "Submit": self._submit,
                        "Leave": self._leave,
                    }
                ),
            )
        )
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def stream(self, *events: pb.WorkResponse, beat: bool = True) -> queue.Queue[Any]:
        """The next stream that a node opens, with these events on it and the beat that says that these are all."""
        made = self.opened.get(timeout=20)
        for event in events:
            made.put(event)
        if beat:
            made.put(pb.WorkResponse(beat=pb.Beat(complete=True)))
        return made

    def stop(self) -> None:
        self._server.stop(None).wait()

    def _join(self, request: Any, context: Any) -> pb.JoinResponse:
        self.joins += 1
        return pb.JoinResponse(
            session=f"session-{self.joins}", max_payload_bytes=10**9, chunk_bytes=100_000, **self.welcome
        )

    def _work(self, request: Any, context: Any) -> Iterator[pb.WorkResponse]:
        made: queue.Queue[Any] = queue.Queue()
        context.add_callback(lambda: made.put(None))
        self.opened.put(made)
        while (event := made.get()) is not None:
            yield event

    def _fetch(self, request: Any, context: Any) -> Iterator[pb.FetchResponse]:
        self.fetched.append(request.offset)
        if self.fetch:
            yield from self.fetch.popleft()(request, context) or ()
            return
        data = self.payloads[request.digest][request.offset :]
        for start in range(0, len(data), 100_000):
            yield pb.FetchResponse(data=data[start : start + 100_000])

    def _submit(self, requests: Any, context: Any) -> Any:
        if self.submit:
            return self.submit.popleft()(requests, context)
        return self.take(requests, pb.VERDICT_ACCEPTED)

    def take(self, requests: Any, verdict: int, reason: str = "") -> pb.SubmitResponse:
        """Read an answer to its end."""
        header = next(requests).header
        self.answers.append((header, b"".join(part.data for part in requests)))
        return pb.SubmitResponse(verdict=verdict, reason=reason)

    def _leave(self, request: Any, context: Any) -> pb.LeaveResponse:
        self.left += 1
        self.on_leave()
        return pb.LeaveResponse()


def abort(code: str, details: str = "scripted") -> Callable[[Any, Any], Any]:
    """A call that ends with a status."""
    return lambda _, context: context.abort(grpc.StatusCode[code], details)


def task(number: int, setup: bytes = b"{}", **fields: Any) -> pb.Task:
    """Task ``number``, of the kind train, with small arrays in it."""
    made = pb.Task(
        id=f"{number:032x}", kind="train", cell="main-seed0", setup=encode(setup)[0], seconds_left=60.0, shortening=1
    )
    arrays = pack({"record": Record("arrays", {"w": np.full(3, number, "<f4")})})
    config = pack({"record": Record("config", {"server-round": number})})
    for name, data in (("arrays", arrays), ("config", config)):
        made.records.add(name=name, payload=encode(data)[0])
    made.MergeFrom(pb.Task(**fields))
    return made


def sent(made: pb.Task) -> pb.WorkResponse:
    return pb.WorkResponse(task=made)


def cancelled(made: pb.Task) -> pb.WorkResponse:
    return pb.WorkResponse(cancel=pb.Cancel(task_id=made.id))


def goodbye(reason: str = "the run is over") -> pb.WorkResponse:
    return pb.WorkResponse(goodbye=pb.Goodbye(reason=reason, final=True))


def large(server: Script, size: int = 300_000) -> pb.Payload:
    """A payload that has to be fetched."""
    data = np.random.default_rng(0).bytes(size)
    server.payloads[hashlib.sha256(data).hexdigest()] = data
    return encode(data)[0]


def setup_of(folder: Path, text: str = SCENARIO) -> bytes:
    """What a server says of a cell."""
    each = scenario.plain(scenario.load(write(folder, text)))
    return json.dumps({"cell": "main-seed0", "scenario": each, "seed": 0}).encode()
