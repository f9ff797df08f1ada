"""The server's end of the link, called by a node that does not keep to the rules."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import io
import pickle
import random
import socket
import struct
import sys
import threading
import time
import zipfile

import grpc
import numpy as np
import psutil
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from trellis import flower, records
from trellis.deploy import allowing
from trellis.deploy.metrics import ServerMetrics
from trellis.errors import GridError
from trellis.grids import _grpc_link, _grpc_uploads
from trellis.grids._grpc_tasks import Answer
from trellis.grids.grpc import GrpcGrid, Settings
from trellis.wire import methods
from trellis.wire.content import Record, pack, unpack
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.nodes import AllowList
from trellis.wire.payload import chunks, encode

SETTINGS = Settings(beat_s=0.3, leave_after_s=1.0, give_up_after_s=60.0, max_payload_bytes=5_000_000)
W = np.arange(100_000, dtype=np.float32)


@pytest.fixture
def grid():
    made = GrpcGrid(3, SETTINGS, run="a-run", min_clients=1)
    made.describe("cell", {"rounds": {"clients_per_round": None}, "evaluation": {"clients": None}}, 0)
    yield made
    made.close()


@pytest.fixture
def calls(grid):
    with grpc.insecure_channel(f"127.0.0.1:{grid.link.port}") as channel:
        yield methods.stubs(channel)


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


def test_a_task_is_fetched_and_answered(grid, calls):
    session = join(calls).session
    going = Round(grid, message())
    task, stream = first_task(calls, session)
    assert task.kind == "train"
    assert 0 < task.seconds_left <= 20
    assert [record.name for record in task.records] == ["arrays", "config"]
    big = task.records[0].payload
    assert not big.inline
    data = b"".join(part.data for part in calls["Fetch"](pb.FetchRequest(session=session, digest=big.digest)))
    assert hashlib.sha256(data).hexdigest() == big.digest
    np.testing.assert_array_equal(unpack(data)["record"].values["w"], W)
    rest = calls["Fetch"](pb.FetchRequest(session=session, digest=big.digest, offset=len(data) - 5))
    assert b"".join(part.data for part in rest) == data[-5:]
    assert submit(calls, session, task.id, answer()).verdict == pb.VERDICT_ACCEPTED
    (reply,) = going.end()
    np.testing.assert_array_equal(reply.content["arrays"]["w"].numpy(), W + 1)
    stream.cancel()
    assert grid.link.payloads.num_bytes == 0  # nothing refers to it any more
    with pytest.raises(grpc.RpcError) as caught:
        list(calls["Fetch"](pb.FetchRequest(session=session, digest=big.digest)))
    assert caught.value.code() == grpc.StatusCode.ABORTED


@pytest.mark.battery("B7", "F3")
def test_an_answer_counts_once(grid, calls):
    session = join(calls).session
    going = Round(grid, message())
    task, _ = first_task(calls, session)
    verdicts = [submit(calls, session, task.id, answer(value)).verdict for value in (1.0, 2.0, 1.0)]
    assert verdicts == [pb.VERDICT_ACCEPTED, pb.VERDICT_DUPLICATE, pb.VERDICT_DUPLICATE]
    (reply,) = going.end()
    assert reply.content["arrays"]["w"].numpy()[0] == 1.0


def test_the_same_question_has_the_same_id(grid, calls):
    """After a restart of the server a node recognises what it has done already."""
    session = join(calls).session
    ids = []
    for number in (1, 1, 2):
        going = Round(grid, message(number=number))
        task, stream = first_task(calls, session)
        ids.append(task.id)
        submit(calls, session, task.id, answer())
        going.end()
        stream.cancel()
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.battery("B6", "B7")
def test_open_tasks_come_again_on_a_new_stream_and_after_a_new_join(grid, calls):
    session = join(calls).session
    going = Round(grid, message())
    task, stream = first_task(calls, session)
    stream.cancel()
    again, stream = first_task(calls, session)
    stream.cancel()
    new = join(calls).session
    third, _ = first_task(calls, new)
    assert task.id == again.id == third.id
    with pytest.raises(grpc.RpcError) as caught:
        submit(calls, session, task.id, answer())
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert submit(calls, new, task.id, answer()).verdict == pb.VERDICT_ACCEPTED
    assert len(going.end()) == 1


@pytest.mark.battery("B7", "F4")
def test_a_node_that_stays_away_fails_its_task_and_a_deadline_ends_the_rest(grid, calls):
    session, other = join(calls, "a", 0).session, join(calls, "b", 1).session
    streams = [calls["Work"](pb.WorkRequest(session=each)) for each in (session, other)]
    started = time.monotonic()
    going = Round(grid, message(0), message(1), message(2), timeout=3.0)
    task, stream = first_task(calls, session)
    stream.cancel()
    streams[0].cancel()
    reasons = {flower.client_of(r.metadata.src_node_id): r.error.reason for r in going.end()}
    assert "gone for 1 s" in reasons[0]
    assert "deadline of 3 s" in reasons[1]
    assert reasons[2] == "no node is this client"
    assert time.monotonic() - started > 2.9
    verdict = submit(calls, other, task.id, answer())
    assert verdict.verdict == pb.VERDICT_STALE  # too late: it counts for nothing


def cut(header, data):
    return header, data[:-10]


def longer(header, data):
    return header, data + b"x"


def altered(header, data):
    return header, data[:-1] + b"\1"


def lies(header, data):
    header.answer.size -= 1
    return header, data


def huge(header, data):
    header.answer.size = header.answer.decoded_size = 10**10
    return header, data


def by_one(header, data):
    header.answer.size = header.answer.decoded_size = SETTINGS.max_payload_bytes + 1
    return header, data


def repeated(header, data):
    return header, data[:50_000] + data


def swapped(header, data):
    return header, data[50_000:100_000] + data[:50_000] + data[100_000:]


def of_another_run(header, data):
    return header, answer(7.0)


def missing(header, data):
    return header, data[:50_000] + data[100_000:]


def strange(header, data):
    header.answer.encoding = 77
    return header, data


@pytest.mark.battery("B5")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (longer, "more than"),
        (altered, "digest"),
        (repeated, "more than"),
        (swapped, "digest"),
        (of_another_run, "digest"),
        (lies, "two different sizes"),
        (huge, "10000000000 bytes; at most 5000000"),
        (by_one, "5000001 bytes"),
        (strange, "encoding 77"),
    ],
)
def test_a_wrong_payload_fails_its_client_and_nobody_else(grid, calls, change, said):
    bad, good = join(calls, "bad", 0).session, join(calls, "good", 1).session
    going = Round(grid, message(0), message(1))
    (one, _), (two, _) = first_task(calls, bad), first_task(calls, good)
    verdict = submit(calls, bad, one.id, answer(), change)
    assert verdict.verdict == pb.VERDICT_REFUSED
    assert said in verdict.reason
    assert submit(calls, good, two.id, answer()).verdict == pb.VERDICT_ACCEPTED
    replies = {flower.client_of(r.metadata.src_node_id): r for r in going.end()}
    assert said in replies[0].error.reason
    assert replies[1].has_content()
    eventually(lambda: grid.link.room.used == 0)  # room is given back, that of the bad answer too


@pytest.mark.battery("B5")
@pytest.mark.parametrize("change", [cut, missing])
def test_what_was_cut_short_may_be_sent_again(grid, calls, change):
    """The end or a chunk in the middle is missing: the node is told to send it again."""
    session = join(calls).session
    going = Round(grid, message())
    task, _ = first_task(calls, session)
    with pytest.raises(grpc.RpcError, match="bytes came") as caught:
        submit(calls, session, task.id, answer(), change)
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    assert submit(calls, session, task.id, answer()).verdict == pb.VERDICT_ACCEPTED
    assert going.end()[0].has_content()


class Opens:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def saved(save, *arrays, **options):
    file = io.BytesIO()
    save(file, *arrays, **options)
    return file.getvalue()


def archive(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        entry = zipfile.ZipInfo(name)
        entry.compress_type = zipfile.ZIP_DEFLATED
        made.writestr(entry, content)
    return file.getvalue()


FOREIGN = {
    "pickle": lambda path: pickle.dumps(Opens(path)),
    "npy of objects": lambda path: saved(np.save, np.array([Opens(path)], object), allow_pickle=True),
    "npz of objects": lambda path: saved(np.savez, np.array([Opens(path)], object)),
    "npy": lambda path: saved(np.save, W),
    "zip bomb": lambda path: archive("w.npy", bytes(100_000_000)),
    "zip slip": lambda path: archive(f"../../../../../../..{path}", b"x"),
    "safetensors of another format": lambda path: struct.pack("<Q", 2) + b"{}",
}


@pytest.mark.battery("B4")
@pytest.mark.parametrize("kind", FOREIGN)
def test_bytes_that_are_no_records_fail_their_client(grid, calls, kind, tmp_path):
    """Pickles, archives and bombs are not opened: their client fails, its neighbour does not, memory stays flat."""
    bad, good = join(calls, "bad", 0).session, join(calls, "good", 1).session
    going = Round(grid, message(0), message(1))
    (one, _), (two, _) = first_task(calls, bad), first_task(calls, good)
    blob = FOREIGN[kind](tmp_path / "opened")
    before = psutil.Process().memory_info().rss
    assert submit(calls, bad, one.id, blob).verdict == pb.VERDICT_ACCEPTED
    assert submit(calls, good, two.id, answer()).verdict == pb.VERDICT_ACCEPTED
    replies = {flower.client_of(r.metadata.src_node_id): r for r in going.end()}
    assert "cannot be read" in replies[0].error.reason
    assert replies[1].has_content()
    assert not (tmp_path / "opened").exists()
    assert psutil.Process().memory_info().rss - before < 50_000_000


@pytest.mark.battery("B7")
def test_a_message_cut_at_any_byte_harms_nobody(grid, calls):
    """A small message that ends at each of its bytes in turn: a status or a refusal, and the task is still open."""
    session = join(calls).session
    going = Round(grid, message(), timeout=60.0)
    task, _ = first_task(calls, session)
    header = next(parts(session, task.id, answer()))
    whole, inner = header.SerializeToString(), header.header.SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{grid.link.port}") as channel:
        raw = channel.stream_unary(f"/{methods.SERVICE}/Submit")
        cases = [whole[:end] for end in range(len(whole))]
        cases += [pb.SubmitRequest(data=inner[:end]).SerializeToString() for end in range(0, len(inner), 20)]
        for end in range(len(inner)):
            cases.append(whole[:1] + _varint(end) + inner[:end])
        for case in cases:
            try:
                verdict = pb.SubmitResponse.FromString(raw(iter([case]), timeout=10)).verdict
            except grpc.RpcError as error:
                assert error.code() in (
                    grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN,
                    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS,
                )  # fmt: skip
            else:
                assert verdict is pb.VERDICT_STALE
    assert submit(calls, session, task.id, answer()).verdict == pb.VERDICT_ACCEPTED
    assert going.end()[0].has_content()


def _varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128, number >> 7])


@pytest.mark.battery("B7")
def test_calls_out_of_order_get_a_status(grid, calls):
    def status(call):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        return caught.value.code()

    code = grpc.StatusCode
    session = join(calls, "a", 0).session
    _stream = calls["Work"](pb.WorkRequest(session=session))
    next(_stream)  # connected from here on
    assert status(lambda: calls["Join"](pb.JoinRequest(protocol=9, node="x"))) is code.FAILED_PRECONDITION
    assert status(lambda: join(calls, "no name!")) is code.INVALID_ARGUMENT
    assert status(lambda: join(calls, "b", 3)) is code.OUT_OF_RANGE
    assert status(lambda: join(calls, "b", 0)) is code.ALREADY_EXISTS
    assert status(lambda: join(calls, "a", None, "another machine")) is code.ALREADY_EXISTS
    assert status(lambda: next(calls["Work"](pb.WorkRequest(session="none")))) is code.NOT_FOUND
    assert status(lambda: next(calls["Fetch"](pb.FetchRequest(session=session, digest="none")))) is code.ABORTED
    assert status(lambda: calls["Submit"](iter(()), timeout=10)) is code.INVALID_ARGUMENT
    assert status(lambda: calls["Submit"](iter([pb.SubmitRequest(data=b"x")]), timeout=10)) is code.INVALID_ARGUMENT
    going = Round(grid, message(1), timeout=0.1)
    assert submit(calls, session, "a task never given", answer()).verdict == pb.VERDICT_STALE
    going.end()


@pytest.mark.battery("B7")
def test_a_node_answers_for_itself_only(grid, calls):
    one, two = join(calls, "a", 0).session, join(calls, "b", 1).session
    going = Round(grid, message(0), message(1))
    (mine, _), (others, _) = first_task(calls, one), first_task(calls, two)
    assert submit(calls, one, others.id, answer(9.0)).verdict == pb.VERDICT_STALE
    for session, task in ((one, mine), (two, others)):
        assert submit(calls, session, task.id, answer()).verdict == pb.VERDICT_ACCEPTED
    assert all(reply.content["arrays"]["w"].numpy()[0] == 1.0 for reply in going.end())


@pytest.mark.battery("B8")
def test_garbage_on_the_port_and_mutated_frames_leave_the_server_up_and_small(grid, calls):
    rng = random.Random(0)
    session = join(calls).session
    going = Round(grid, message(), timeout=60.0)
    task, _ = first_task(calls, session)
    good = next(parts(session, task.id, answer())).SerializeToString()
    raw = {
        name: getattr(grpc.insecure_channel(f"127.0.0.1:{grid.link.port}"), methods.CALLS[name][0])(
            f"/{methods.SERVICE}/{name}"
        )
        for name in methods.CALLS
    }

    def attack(count):
        for _ in range(count):
            frame = bytearray(good)
            for _ in range(rng.randrange(1, 6)):
                frame[rng.randrange(len(frame))] = rng.randrange(256)
            frame = bytes(frame[: rng.randrange(len(frame))]) if rng.random() < 0.3 else bytes(frame)
            for name in ("Join", "Submit", "Leave"):
                if frame.find(session.encode()) >= 0 and name != "Join":
                    continue  # these could be meant
                try:
                    raw[name](iter([frame]) if name == "Submit" else frame, timeout=10)
                except grpc.RpcError as error:
                    assert error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED

    attack(50)
    before = psutil.Process().memory_info().rss
    attack(700)
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", grid.link.port)) as connection:
            connection.sendall(rng.randbytes(5000))
    assert psutil.Process().memory_info().rss - before < 50_000_000
    assert submit(calls, session, task.id, answer()).verdict == pb.VERDICT_ACCEPTED
    assert going.end()[0].has_content()


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


def test_health_is_served(grid):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{grid.link.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", methods.SERVICE):
            status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
            assert status == health_pb2.HealthCheckResponse.SERVING


def test_a_node_that_leaves_for_a_while_finds_its_task_again(grid, calls):
    session = join(calls).session
    going = Round(grid, message())
    task, _ = first_task(calls, session)
    calls["Leave"](pb.LeaveRequest(session=session, reason="restart"))
    session = join(calls, instance="another").session  # nobody is connected under that name
    again, _ = first_task(calls, session)
    assert again.id == task.id
    assert submit(calls, session, task.id, answer()).verdict == pb.VERDICT_ACCEPTED
    assert going.end()[0].has_content()


def test_a_node_that_leaves_for_good_fails_its_task_at_once(grid, calls):
    session = join(calls).session
    going = Round(grid, message())
    first_task(calls, session)
    calls["Leave"](pb.LeaveRequest(session=session, reason="maintenance", for_good=True))
    assert going.end()[0].error.reason == "its node left: maintenance"


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


@pytest.mark.battery("B7")
def test_a_node_that_comes_back_as_another_client_ends_its_task(grid, calls):
    """The round ends at once with a reason, and not never."""
    session = join(calls, client=0).session
    going = Round(grid, message(), timeout=20.0)
    _, stream = first_task(calls, session)
    stream.cancel()
    started = time.monotonic()
    assert join(calls, client=1).client == 1
    assert going.end()[0].error.reason == "its node is client 1 from now on"
    assert time.monotonic() - started < 15
    assert grid.link.payloads.num_bytes == 0


@pytest.mark.battery("F3")
def test_a_replay_says_that_it_is_whole_once_the_server_asks(grid, calls):
    """A server that came back does not call off what a node does before it knows what it will ask itself."""
    session = join(calls).session
    stream = calls["Work"](pb.WorkRequest(session=session), timeout=20)
    assert not next(stream).beat.complete
    going = Round(grid, message())
    events = [next(stream) for _ in range(2)]
    assert events[0].task.id
    assert events[1].beat.complete
    assert submit(calls, session, events[0].task.id, answer()).verdict == pb.VERDICT_ACCEPTED
    going.end()


def test_a_task_that_is_closed_and_asked_again_at_once_is_sent_again(grid, calls):
    session = join(calls).session
    going = Round(grid, message(), timeout=0.5)
    task, stream = first_task(calls, session)
    (each,) = grid.link.nodes[0].tasks.values()
    payloads = {record.payload.digest: grid.link.payloads.get(record.payload.digest) for record in task.records}

    def at_once():
        grid.link.close_task(0, task.id, Answer(code=2, reason="too late"))
        grid.link.open([dataclasses.replace(each, close=lambda _: None)], payloads)

    grid.link.call(at_once)
    again = next(event.task for event in stream if event.WhichOneof("event") != "beat")
    assert again.id == task.id
    assert submit(calls, session, task.id, answer()).verdict == pb.VERDICT_ACCEPTED
    going.end()


@pytest.mark.battery("F1")
def test_an_answer_from_before_the_server_went_away_waits_for_its_question(grid, calls):
    """It is not thrown away because it came before the server that is back could ask again."""
    session = join(calls).session
    probe = GrpcGrid(3, SETTINGS, run="a-run", min_clients=1)  # the server before: it asked the same
    with probe:
        probe.describe("cell", {"rounds": {"clients_per_round": None}, "evaluation": {"clients": None}}, 0)
        with grpc.insecure_channel(f"127.0.0.1:{probe.link.port}") as channel:
            before = methods.stubs(channel)
            earlier = join(before).session
            asked = Round(probe, message(), timeout=20.0)
            task, _ = first_task(before, earlier)
            submit(before, earlier, task.id, answer())
            asked.end()
    early = calls["Submit"].future(parts(session, task.id, answer(5.0)), timeout=30)
    time.sleep(0.3)
    assert not early.done()
    going = Round(grid, message())
    assert early.result().verdict == pb.VERDICT_ACCEPTED
    assert going.end()[0].content["arrays"]["w"].numpy()[0] == 5.0


@pytest.mark.battery("F1", "F2")
def test_a_checkpoint_says_which_answers_count(grid, calls):
    """After a restart an answer that counted is a duplicate, and the next task says that its state is to be used."""
    grid.recall({})
    session = join(calls).session
    afters, answered = [], []
    for number in (1, 2):
        going = Round(grid, message(number=number))
        task, stream = first_task(calls, session)
        afters.append(task.after)
        answered.append(task.id)
        assert task.HasField("after")
        submit(calls, session, task.id, answer())
        going.end()
        stream.cancel()
    assert afters == ["", answered[0]]
    kept = grid.remembered()
    with GrpcGrid(3, SETTINGS, run="a-run", min_clients=1) as later:
        later.describe("cell", {"rounds": {"clients_per_round": None}, "evaluation": {"clients": None}}, 0)
        with grpc.insecure_channel(f"127.0.0.1:{later.link.port}") as channel:
            back = methods.stubs(channel)
            session = join(back).session
            later.recall(kept)
            assert submit(back, session, answered[1], answer()).verdict == pb.VERDICT_DUPLICATE
            going = Round(later, message(number=3))
            task, _ = first_task(back, session)
            assert task.after == answered[1]
            submit(back, session, task.id, answer())
            going.end()
            later.recall(None)  # a checkpoint of an earlier version says nothing of it
            going = Round(later, message(number=4))
            task, _ = first_task(back, session)
            assert not task.HasField("after")
            submit(back, session, task.id, answer())
            going.end()


def test_a_failure_counts_for_no_state(grid, calls):
    grid.recall({})
    session = join(calls).session
    going = Round(grid, message())
    task, stream = first_task(calls, session)
    failed = pb.SubmitHeader(session=session, task_id=task.id, failure=pb.Failure(code=2, reason="no"))
    assert calls["Submit"](iter([pb.SubmitRequest(header=failed)])).verdict == pb.VERDICT_ACCEPTED
    assert going.end()[0].error.reason == "no"
    stream.cancel()
    assert grid.remembered() == {}


def test_a_refused_answer_stays_refused(grid, calls):
    """If the node did not hear so it asks again; told that it is a duplicate, it would make a lost state count."""
    session = join(calls).session
    going = Round(grid, message())
    task, _ = first_task(calls, session)
    for _ in range(2):
        assert submit(calls, session, task.id, answer(), altered).verdict == pb.VERDICT_REFUSED
    assert "digest" in going.end()[0].error.reason


def test_nodes_find_their_clients_after_a_restart(tmp_path):
    """Whoever comes first: a client's data and state lie with its node."""
    settings = dataclasses.replace(SETTINGS, folder=tmp_path)
    for order in (["x", "y", "z"], ["z", "w", "x", "y"]):
        with GrpcGrid(3, settings, min_clients=1) as grid, grpc.insecure_channel(f"127.0.0.1:{grid.link.port}") as c:
            calls, found = methods.stubs(c), {}
            for each in order:
                if each == "w":  # a stranger is given no seat that its owner may come back to
                    with pytest.raises(grpc.RpcError) as caught:
                        join(calls, each, instance=each)
                    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                else:
                    found[each] = join(calls, each, instance=each).client
            assert found == {"x": 0, "y": 1, "z": 2}


def test_a_seat_is_its_nodes_for_a_while_and_then_free(grid, calls):
    for name in ("a", "b", "c"):
        join(calls, name, instance=name)
    session = join(calls, "a", instance="a").session
    stream = calls["Work"](pb.WorkRequest(session=session))
    next(stream)
    stream.cancel()
    for wish in (None, 0):
        with pytest.raises(grpc.RpcError):
            join(calls, "d", wish, "d")  # a blip costs nobody its place
    eventually(lambda: grid.link.connected() == [], 20)
    assert join(calls, "d", instance="d").client in range(3)


@pytest.mark.battery("B6")
def test_clients_that_the_list_gives_to_others_are_not_to_be_had(tmp_path):
    path = tmp_path / "nodes.yaml"
    owner, roaming = allowing.admit(path, "owner", client=0), allowing.admit(path, "roaming")
    settings = dataclasses.replace(SETTINGS, allow=AllowList(path))
    with GrpcGrid(2, settings, min_clients=1) as grid, grpc.insecure_channel(f"127.0.0.1:{grid.link.port}") as channel:
        calls = methods.stubs(channel)

        def come(token, client=None):
            request = pb.JoinRequest(protocol=1, instance=token[:8])
            if client is not None:
                request.client = client
            return calls["Join"](request, metadata=(("authorization", f"Bearer {token}"),), timeout=10).client

        with pytest.raises(grpc.RpcError) as caught:
            come(roaming, 0)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert come(roaming) == 1
        assert come(owner) == 0
        allowing.admit(path, "roaming")  # the token leaked: whoever came in with it goes
        eventually(lambda: 1 not in grid.link.nodes)
        assert 0 in grid.link.nodes


@pytest.mark.battery("F11")
def test_too_few_clients_end_the_run_with_a_reason():
    settings = dataclasses.replace(SETTINGS, give_up_after_s=0.5, leave_after_s=30.0)
    with GrpcGrid(3, settings) as grid, grpc.insecure_channel(f"127.0.0.1:{grid.link.port}") as channel:
        calls = methods.stubs(channel)
        stream = calls["Work"](pb.WorkRequest(session=join(calls).session))
        next(stream)
        with pytest.raises(GridError, match="1 of 3 clients are there") as caught:
            grid.get_node_ids()
        assert caught.value.code == "too-few-clients"


def test_later_rounds_wait_for_the_quorum_only(grid, calls):
    with GrpcGrid(3, SETTINGS) as grid, grpc.insecure_channel(f"127.0.0.1:{grid.link.port}") as channel:
        calls = methods.stubs(channel)
        rounds = {"clients_per_round": None, "quorum": 0.5}
        grid.describe("cell", {"rounds": rounds, "evaluation": {"clients": None}}, 0)
        sessions = [join(calls, name, instance=name).session for name in "abc"]
        streams = [calls["Work"](pb.WorkRequest(session=session)) for session in sessions]
        assert len(list(grid.get_node_ids())) == 3
        going = Round(grid, message(0), timeout=0.2)
        going.end()
        streams[2].cancel()
        eventually(lambda: len(grid.link.connected()) == 2, 20)
        assert len(list(grid.get_node_ids())) == 3  # the one that is lost makes up the number, and fails at once
        for stream in streams[:2]:
            stream.cancel()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"settings": {"leave_after_s": 0.0}}, "leave-after is 0"),
        ({"settings": {"give_up_after_s": -1}}, "give-up-after is -1"),
        ({"min_clients": 0}, "min-clients is 0; it has to be from 1 to 3"),
        ({"min_clients": 4}, "min-clients is 4"),
    ],
)
def test_options_out_of_range_are_named(options, said):
    with pytest.raises(GridError, match=said):
        GrpcGrid(3, dataclasses.replace(SETTINGS, **options.pop("settings", {})), **options)


@pytest.mark.battery("L6")
def test_a_payload_that_is_not_taken_is_let_go(grid, calls):
    """A node that reads nothing keeps neither the model of a round in memory nor more than a few calls open."""
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


def test_metrics_say_what_an_operator_asks(grid, calls):
    metrics = ServerMetrics(None)
    metrics.watch(grid.link)
    grid.link.counted = metrics.count
    session = join(calls).session
    going = Round(grid, message())
    task, stream = first_task(calls, session)
    read = metrics.registry.get_sample_value
    assert read("trellis_connected") == 1
    assert read("trellis_clients") == 3
    assert read("trellis_tasks") == 1
    assert read("trellis_payload_bytes") == grid.link.payloads.num_bytes > 0
    submit(calls, session, task.id, answer())
    going.end()
    stream.cancel()
    assert read("trellis_answer_total", {"node": "n", "outcome": "accepted"}) == 1
    failures = [
        {"client": 0, "phase": "train", "reason": "nonfinite: array w holds NaN"},
        {"client": 2, "phase": "train", "reason": "no node is this client"},
    ]
    metrics.round("main-seed0", {"round": 4, "seconds": 0.5, "failures": failures})
    assert read("trellis_round", {"cell": "main-seed0"}) == 4
    assert read("trellis_lost_total", {"node": "n", "client": "0", "code": "nonfinite"}) == 1
    assert read("trellis_lost_total", {"node": "", "client": "2", "code": "failed"}) == 1
    assert read("trellis_round_seconds_count", {"cell": "main-seed0"}) == 1
