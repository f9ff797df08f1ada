"""Large payloads in both directions: each is encoded once, and what lies on the server is bounded."""

from __future__ import annotations

import asyncio
import sys
import threading

import grpc
import numpy as np
import pytest
from flwr.app import Message, RecordDict

from link_calls import Round, W, answer, eventually, first_task, join, message, submit
from trellis import flower, records
from trellis.grids import _grpc_link, _grpc_uploads
from trellis.wire import methods
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.payload import encode


def test_a_shared_payload_is_encoded_once(grid, calls, monkeypatch):
    from trellis.grids import grpc as module

    encoded = []
    original = module.encode
    monkeypatch.setattr(module, "encode", lambda *a: encoded.append(len(a[0])) or original(*a))
    shared = records.array_record({"w": W})
    sessions = [join(calls, f"n{client}", client).session for client in range(3)]
    messages = [Message(RecordDict({"arrays": shared}), flower.node_of(client), "train") for client in range(3)]
    going = Round(grid, *messages)
    tasks = [first_task(calls, session)[0] for session in sessions]
    assert len(encoded) == 1
    assert grid.link.payloads.num_bytes == encoded[0]
    for session, task in zip(sessions, tasks, strict=True):
        submit(calls, session, task.id, answer())
    assert len(going.end()) == 3


@pytest.mark.battery("L3")
def test_uploads_wait_for_room_and_none_is_lost(calls, grid):
    """Answers together are larger than what may be under way: they come one by one."""
    grid.link.room.size = len(answer()) + 10
    sessions = [join(calls, f"n{client}", client).session for client in range(3)]
    going = Round(grid, *[message(client) for client in range(3)])
    tasks = [first_task(calls, session)[0] for session in sessions]
    threads = [
        threading.Thread(target=submit, args=(calls, session, task.id, answer()))
        for session, task in zip(sessions, tasks, strict=True)
    ]
    for thread in threads:
        thread.start()
    assert len([reply for reply in going.end() if reply.has_content()]) == 3
    for thread in threads:
        thread.join()
    assert len(answer()) <= grid.link.room.highest <= 2 * len(answer()) + 10  # one may go beyond, for it to end


@pytest.mark.battery("F4", "L6")
def test_an_upload_that_stalls_holds_up_nobody(grid, calls):
    """One node says that it will send more than there is room for, and stops: others end this round and the next."""
    grid.link.room.size = len(answer()) + 10
    bad, good = join(calls, "bad", 0).session, join(calls, "good", 1).session
    more = threading.Event()

    def stalled(task):
        payload, data = encode(bytes(4_000_000))
        payload.inline = b""
        yield pb.SubmitRequest(header=pb.SubmitHeader(session=bad, task_id=task, answer=payload))
        yield pb.SubmitRequest(data=data[:1000])
        more.wait(30)
        yield pb.SubmitRequest(data=data[1000:])

    for number in (1, 2):
        going = Round(grid, message(0, number), message(1, number), timeout=1.5)
        (one, a), (two, b) = first_task(calls, bad), first_task(calls, good)
        if number == 1:
            call = calls["Submit"].future(stalled(one.id), timeout=30)
        assert submit(calls, good, two.id, answer()).verdict == pb.VERDICT_ACCEPTED
        replies = {flower.client_of(r.metadata.src_node_id): r for r in going.end()}
        assert replies[1].has_content()
        assert "deadline" in replies[0].error.reason
        a.cancel()
        b.cancel()
    assert call.result().verdict == pb.VERDICT_STALE  # it ended with its task, not with its last byte
    more.set()
    eventually(lambda: grid.link.room.used == 0)


def test_nothing_goes_beyond_the_room_while_answers_wait_to_be_read():
    """Else a server that is busy with a large model would take in one answer after another, each beyond the room."""

    async def check():
        room, waiting = _grpc_uploads.Room(100), []
        await room.take("a", 90)
        room.keep(90)
        await room.end("a")
        for name in "bc":
            waiting.append(asyncio.ensure_future(room.take(name, 60)))
        await asyncio.sleep(0.05)
        assert room.used == 90 and not any(each.done() for each in waiting)
        await room.read(90)
        await asyncio.wait_for(waiting[0], 10)
        await asyncio.wait_for(waiting[1], 10)  # both are under way: one may go beyond
        assert (room.used, room.unread, room.highest) == (120, 0, 120)

    asyncio.run(check())


def test_one_upload_goes_beyond_the_room_at_a_time_and_only_while_it_moves():
    async def scene():
        room, clock = _grpc_uploads.Room(100), [0.0]
        first, second, third = object(), object(), object()
        await room.take(first, 60)
        await room.take(second, 60)  # beyond: the first that waits goes on
        waiting = asyncio.ensure_future(room.take(third, 10))
        await asyncio.sleep(0)
        assert not waiting.done()
        await room.take(second, 60)
        await room.end(second)
        await room.free(120)
        await waiting
        assert (room.used, room.highest) == (70, 180)
        await room.take(third, 60)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_grpc_uploads.time, "monotonic", lambda: clock[0] + 1e6)
            with pytest.raises(_grpc_uploads.TooSlowError):
                await room.take(third, 1)

    asyncio.run(scene())


@pytest.mark.battery("L6")
def test_a_payload_that_is_not_taken_is_let_go(grid):
    """A node that reads nothing keeps neither the model of a round in memory nor more than a few calls open."""
    # Without probes, gRPC's own buffer at the node stays small: on a slow machine it grows to take the whole payload.
    options = [("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(f"127.0.0.1:{grid.link.port}", options) as channel:
        calls = methods.stubs(channel)
        session = join(calls).session
        big = records.array_record({"w": np.zeros(8_000_000, np.float32)})
        going = Round(grid, Message(RecordDict({"arrays": big}), flower.node_of(0), "train"), timeout=2.0)
        task, _ = first_task(calls, session)
        digest = task.records[0].payload.digest
        request = pb.FetchRequest(session=session, digest=digest)
        stalled = [calls["Fetch"](request) for _ in range(_grpc_link.FETCHES)]
        for call in stalled:
            next(call)
        with pytest.raises(grpc.RpcError) as caught:
            next(calls["Fetch"](request))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        data = grid.link.payloads.get(digest)
        going.end()
        assert grid.link.payloads.num_bytes == 0
        assert sys.getrefcount(data) == 2  # this test's own
        for call in stalled:
            with pytest.raises(grpc.RpcError) as caught:
                for _ in call:
                    pass
            assert caught.value.code() is grpc.StatusCode.ABORTED
