"""The server's end of the link, called by a node that does not keep to the rules."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import socket
import time

import grpc
import numpy as np
import psutil
import pytest

from link_calls import SETTINGS, Round, W, answer, eventually, first_task, join, message, parts, submit
from trellis import flower
from trellis.deploy.metrics import ServerMetrics
from trellis.errors import GridError
from trellis.grids.grpc import GrpcGrid
from trellis.wire import methods
from trellis.wire.content import unpack
from trellis.wire.generated import link_pb2 as pb


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


def test_health_is_served(grid):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{grid.link.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", methods.SERVICE):
            status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
            assert status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.battery("F11")
@pytest.mark.timeout(45)
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
