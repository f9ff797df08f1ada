"""Nodes and servers that go and come back: whose task, whose seat, and which answers count."""

from __future__ import annotations

import dataclasses
import time

import grpc
import pytest

from link_calls import SETTINGS, Round, answer, eventually, first_task, join, message, parts, submit
from trellis.deploy import allowing
from trellis.grids._grpc_tasks import Answer
from trellis.grids.grpc import GrpcGrid
from trellis.wire import methods
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.nodes import AllowList


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
