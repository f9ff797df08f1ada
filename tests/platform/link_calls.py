"""Calls of the link by a node of the tests' own, and rounds that wait for it."""

from __future__ import annotations

import threading
import time

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from trellis import flower, records
from trellis.grids.grpc import Settings
from trellis.wire.content import Record, pack
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.payload import chunks, encode

SETTINGS = Settings(beat_s=0.3, leave_after_s=1.0, give_up_after_s=60.0, max_payload_bytes=5_000_000)
W = np.arange(100_000, dtype=np.float32)


def message(client=0, number=1):
    content = RecordDict({"arrays": records.array_record({"w": W}), "config": ConfigRecord({"server-round": number})})
    return Message(content, flower.node_of(client), "train")


class Round:
    """Messages under way in a thread, and their replies."""

    def __init__(self, grid, *messages, timeout=20.0):
        self.replies = []

        def run():
            for reply in grid.stream(messages, timeout=timeout):
                self.replies.append(reply)

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def end(self):
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self.replies


def eventually(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def join(calls, name="n", client=None, instance="i"):
    request = pb.JoinRequest(protocol=1, node=name, instance=instance, kind=pb.NODE_KIND_TRAIN)
    if client is not None:
        request.client = client
    return calls["Join"](request, timeout=10)


def first_task(calls, session):
    stream = calls["Work"](pb.WorkRequest(session=session), timeout=20)
    for event in stream:
        if event.WhichOneof("event") == "task":
            return event.task, stream
    raise AssertionError("the stream ended")


def answer(value=1.0):
    return pack({"arrays": Record("arrays", {"w": W + value}), "metrics": Record("metrics", {"num-examples": 3})})


def parts(session, task, blob, change=lambda header, data: (header, data), size=50_000):
    payload, data = encode(blob)
    payload.inline = b""
    header, data = change(pb.SubmitHeader(session=session, task_id=task, answer=payload), data)
    yield pb.SubmitRequest(header=header)
    for chunk in chunks(data, size=size):
        yield pb.SubmitRequest(data=chunk)


def submit(calls, *arguments, **options):
    return calls["Submit"](parts(*arguments, **options), timeout=10)
