"""RayGrid on a real Ray: the same replies as LocalGrid, and no client that can hurt another."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from trellis import flower, memory, records
from trellis.errors import GridError
from trellis.grids._ray_cohort import Batch, Cohort
from trellis.grids.local import LocalGrid
from trellis.grids.ordered import Ordered
from trellis.grids.ray import MAX_CRASHES, RayGrid, start_ray

CLIENTS = 8
WORKERS = 2


def make_app() -> ClientApp:
    """An app whose clients do as ``config`` says: those listed in ``clients`` do ``do``, all others train."""
    import os
    import signal
    import sys
    import threading

    import numpy as np
    from flwr.app import ConfigRecord, Context, Error, MetricRecord

    from trellis import flower, records

    class TwoPartError(Exception):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(first)

    app = ClientApp()
    hoard: list[object] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        config = message.content["config"]
        sent = message.content["arrays"]
        content = RecordDict()
        if client in config.get("clients", []):
            match config["do"]:
                case "exit":
                    os._exit(3)
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    threading.Event().wait()
                case "sys.exit":
                    sys.exit(4)
                case "raise":
                    raise ValueError(f"client {client} has no data")
                case "raise-unreadable":
                    raise TwoPartError("a", "b")
                case "error":
                    return Message(Error(77, "not today"), reply_to=message)
                case "unpicklable":
                    content["arrays"] = records.array_record({"w": np.array([threading.Lock()], dtype=object)})
                    return flower.reply(content, message)
                case "remember":
                    memory = context.state.get("memory", {"turns": records.LiveArray(np.zeros(50_000))})
                    turns = memory["turns"].numpy() + 1
                    context.state["memory"] = records.array_record({"turns": turns})
                    content["metrics"] = MetricRecord({"turns": int(turns[0])})
                case "wait":
                    with open(str(config["fifo"])) as fifo:
                        fifo.read()
                case "grow":
                    hoard.append(np.ones(8_000_000))
        content["arrays"] = records.array_record({k: v.numpy() * 2 + client for k, v in sent.items()})
        shared = all(not records.view(array).flags.owndata for array in sent.values())
        content["worker"] = ConfigRecord({"pid": os.getpid(), "shared": shared, "torch": "torch" in sys.modules})
        return flower.reply(content, message)

    return app


class Grids:
    """At most one open grid, as there are two CPU slots; the plain one lives through all tests that share it."""

    def __init__(self) -> None:
        self._plain: RayGrid | None = None

    def plain(self) -> RayGrid:
        if self._plain is None:
            self._plain = RayGrid(make_app, CLIENTS, workers=WORKERS)
        return self._plain

    def other(self, factory: Any = make_app, num_clients: int = CLIENTS, **options: Any) -> RayGrid:
        self.close()
        return RayGrid(factory, num_clients, **options)

    def close(self) -> None:
        if self._plain is not None:
            self._plain.close()
            self._plain = None


@pytest.fixture(scope="module")
def grids(ray_session: None) -> Iterator[Grids]:
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)  # workers cannot import a test
    grids = Grids()
    yield grids
    grids.close()
    cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture
def grid(grids: Grids) -> Iterator[RayGrid]:
    grid = grids.plain()
    yield grid
    grid.crashes.clear()
    grid.states.clear()


def cohort(
    grid: RayGrid | LocalGrid | Ordered, do: str = "train", clients: tuple[int, ...] = (), **config: Any
) -> list[Message]:
    """One message to every client, all with the same content object."""
    arrays = records.array_record({"w": np.arange(30_000.0), "b": np.ones(3, dtype=np.float32)})
    told = ConfigRecord({"do": do, "clients": list(clients), **config})
    content = RecordDict({"arrays": arrays, "config": told})
    return [grid.create_message(content, "train", node, "1") for node in grid.get_node_ids()]


def by_client(replies: list[Message]) -> dict[int, Message]:
    result = {flower.client_of(reply.metadata.src_node_id): reply for reply in replies}
    assert len(result) == len(replies) == CLIENTS
    return result


def errors(replies: list[Message]) -> dict[int, tuple[int, str]]:
    return {c: (r.error.code, r.error.reason) for c, r in by_client(replies).items() if r.has_error()}


def pids(replies: list[Message]) -> set[int]:
    return {int(r.content["worker"]["pid"]) for r in replies if r.has_content()}


def code_of(act: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(GridError) as caught:
        act()
    return caught.value.code, caught.value.message


# ------------------------------------------------------------------------------------------ what clients get


def test_replies_are_those_of_the_local_grid(grid: RayGrid) -> None:
    local = LocalGrid(make_app(), CLIENTS)
    there = list(Ordered(grid).stream(cohort(grid)))
    here = list(local.stream(cohort(local)))
    assert [r.metadata.src_node_id for r in there] == [r.metadata.src_node_id for r in here]
    for ours, theirs in zip(there, here, strict=True):
        assert records.digest(ours.content["arrays"]) == records.digest(theirs.content["arrays"])
        assert ours.metadata.message_type == theirs.metadata.message_type
        assert ours.metadata.dst_node_id == theirs.metadata.dst_node_id == flower.SERVER_NODE
        assert ours.metadata.group_id == "1"
    assert len(pids(there)) == WORKERS
    assert os.getpid() not in pids(there)


def test_shared_content_is_stored_once_and_read_without_a_copy(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    stored = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: stored.append(value) or put(value))
    first, second = cohort(grid), cohort(grid)
    mixed = [second[i] if i in (2, 5) else message for i, message in enumerate(first)]
    replies = list(grid.stream(mixed))
    assert not errors(replies)
    assert [id(content) for content in stored] == [id(first[0].content), id(second[2].content)]
    assert all(reply.content["worker"]["shared"] for reply in replies)


def test_a_worker_imports_no_torch_that_its_app_does_not(grid: RayGrid) -> None:
    assert not any(reply.content["worker"]["torch"] for reply in grid.stream(cohort(grid)))


def test_state_is_kept_for_those_that_have_any(grid: RayGrid) -> None:
    for turn in (1, 2):
        replies = by_client(list(grid.stream(cohort(grid, "remember", (1, 6)))))
        assert grid.changed == {1, 6}
        assert {c: r.content["metrics"]["turns"] for c, r in replies.items() if "metrics" in r.content} == {
            1: turn,
            6: turn,
        }
        grid.changed.clear()
    assert set(grid.states) == {1, 6}
    memory = records.view(grid.states[1]["memory"]["turns"])
    assert memory[0] == 2
    assert memory.base is None or memory.base.flags.owndata  # not a place in the object store


def test_state_survives_a_crash(grid: RayGrid) -> None:
    list(grid.stream(cohort(grid, "remember", (1,))))
    assert list(errors(list(grid.stream(cohort(grid, "exit", (1,)))))) == [1]
    replies = by_client(list(grid.stream(cohort(grid, "remember", (1,)))))
    assert replies[1].content["metrics"]["turns"] == 2


# ------------------------------------------------------------------------------------------- clients that fail


@pytest.mark.battery("F8")
@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_client_that_takes_its_worker_down_fails_alone(grid: RayGrid, how: str) -> None:
    before = pids(list(grid.stream(cohort(grid))))
    failed = errors(list(grid.stream(cohort(grid, how, (2,)))))
    assert list(failed) == [2]
    assert failed[2][0] == flower.FAILED_WORKER
    assert failed[2][1].startswith("its worker died: ")
    assert grid.crashes == {2: 1}
    again = list(grid.stream(cohort(grid)))
    assert not errors(again)
    assert len(pids(again)) == WORKERS
    assert pids(again) != before


@pytest.mark.battery("F8")
def test_a_client_that_crashes_again_and_again_is_not_run(grid: RayGrid) -> None:
    for _ in range(MAX_CRASHES):
        assert "worker died" in errors(list(grid.stream(cohort(grid, "exit", (0,)))))[0][1]
    before = pids(list(grid.stream(cohort(grid))))
    failed = errors(list(grid.stream(cohort(grid, "exit", (0,)))))
    assert failed == {0: (flower.FAILED_WORKER, f"quarantined after {MAX_CRASHES} crashes")}
    assert pids(list(grid.stream(cohort(grid)))) == before


@pytest.mark.battery("F9")
def test_clients_that_raise_or_send_nonsense_fail_alone(grid: RayGrid) -> None:
    before = pids(list(grid.stream(cohort(grid))))
    expected = {
        "raise": (flower.FAILED_CLIENT, "ValueError: client 4 has no data"),
        "sys.exit": (flower.FAILED_CLIENT, "SystemExit: 4"),
        "raise-unreadable": (flower.FAILED_CLIENT, "TwoPartError: a"),
        "error": (77, "not today"),
        "unpicklable": (
            flower.FAILED_CLIENT,
            "its reply could not be sent: TypeError: cannot pickle '_thread.lock' object",
        ),
    }
    for do, error in expected.items():
        replies = list(grid.stream(cohort(grid, do, (4,))))
        assert errors(replies) == {4: error}
        assert pids(replies) <= before
    assert not grid.crashes


@pytest.mark.battery("F9")
def test_a_hanging_client_is_cut_at_the_deadline(grid: RayGrid) -> None:
    list(grid.stream(cohort(grid)))
    failed = errors(list(grid.stream(cohort(grid, "hang", (1,)), timeout=3)))
    assert failed == {1: (flower.FAILED_DEADLINE, "no reply before the deadline of 3 s")}
    assert not grid.crashes
    assert not errors(list(grid.stream(cohort(grid), timeout=60)))


def test_all_clients_late_are_all_reported(grid: RayGrid) -> None:
    failed = errors(list(grid.stream(cohort(grid, "hang", tuple(range(CLIENTS))), timeout=0.2)))
    assert {code for code, _ in failed.values()} == {flower.FAILED_DEADLINE}
    assert len(failed) == CLIENTS
    assert not errors(list(grid.stream(cohort(grid))))


def test_replies_that_nobody_wants_leave_nothing_behind(grid: RayGrid) -> None:
    stream = grid.stream(cohort(grid, "hang", (5,)))
    next(stream)
    assert code_of(lambda: next(grid.stream(cohort(grid))))[0] == "grid-busy"
    stream.close()
    assert not errors(list(grid.stream(cohort(grid))))


# ------------------------------------------------------------------------------------------------ push and pull


def test_push_returns_at_once_and_pull_takes_what_is_there(
    grid: RayGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    arrived: queue.Queue[Message] = queue.Queue()
    finish = grid._finish

    def report(reply: Message) -> None:
        finish(reply)
        arrived.put(reply)

    monkeypatch.setattr(grid, "_finish", report)
    ids = list(grid.push_messages(cohort(grid, "wait", (0,), fifo=str(fifo))))
    others = [arrived.get(timeout=60) for _ in range(CLIENTS - 1)]
    assert {flower.client_of(reply.metadata.src_node_id) for reply in others} == set(range(1, CLIENTS))
    pulled = list(grid.pull_messages(ids))
    assert {reply.metadata.reply_to_message_id for reply in pulled} == set(ids[1:])
    fifo.write_text("go")  # returns when the client reads
    arrived.get(timeout=60)
    (last,) = grid.pull_messages(ids)
    assert last.metadata.reply_to_message_id == ids[0]
    assert not list(grid.pull_messages(ids))


# ------------------------------------------------------------------------------------------ workers and Ray itself


def test_more_workers_than_cpus_is_an_error(grids: Grids) -> None:
    code, message = code_of(lambda: RayGrid(make_app, CLIENTS, workers=3))
    assert code == "ray-workers"
    assert "runtime.workers is 3, but the Ray cluster has 2 CPUs" in message


def test_more_gpu_shares_than_gpus_is_an_error(grids: Grids) -> None:
    code, message = code_of(lambda: RayGrid(make_app, CLIENTS, workers=2, gpus_per_worker=64))
    assert code == "ray-workers"
    assert "gpus_per_worker is 64 for 2 workers" in message


def test_a_closed_grid_says_so(grids: Grids) -> None:
    import ray

    grid = grids.other(workers=1)
    stream = grid.stream(cohort(grid))
    grid.close()
    grid.close()
    assert ray.is_initialized(), "the grid stopped a Ray that it had not started"
    for act in (lambda: grid.stream([]), lambda: next(stream), lambda: grid.push_messages([]), grid.start):
        assert code_of(act)[0] == "grid-closed"


def test_a_grid_that_started_ray_stops_it_once(grids: Grids, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []
    monkeypatch.setattr("trellis.grids.ray.start_ray", lambda address: True)
    monkeypatch.setattr("trellis.grids.ray.stop_ray", lambda: stopped.append(True))
    grid = grids.other(workers=1)
    assert not stopped
    grid.close()
    grid.close()
    assert stopped == [True]
    code_of(lambda: RayGrid(make_app, CLIENTS, workers=3))
    assert stopped == [True, True]


def test_close_answers_what_was_pushed(grids: Grids) -> None:
    grid = grids.other(workers=1)
    ids = list(grid.push_messages(cohort(grid, "hang", (0,))))
    grid.close()
    assert {reply.metadata.reply_to_message_id for reply in grid.pull_messages(ids)} == set(ids)


def test_an_app_that_cannot_be_made_ends_the_run(grids: Grids) -> None:
    def broken() -> ClientApp:
        raise LookupError("no data set in this folder")

    grid = grids.other(broken, workers=1)
    code, message = code_of(grid.start)
    grid.close()
    assert code == "ray-worker-app"
    assert message.endswith("LookupError: no data set in this folder")


def test_workers_that_die_while_they_make_the_app_end_the_run(grids: Grids) -> None:
    def deadly() -> ClientApp:
        os._exit(1)

    grid = grids.other(deadly, workers=1)
    code, message = code_of(lambda: list(grid.stream(cohort(grid))))
    grid.close()
    assert code == "ray-worker-start"
    assert message.startswith("3 workers in a row died")


def test_a_worker_that_does_not_start_ends_the_run(grids: Grids) -> None:
    def endless() -> ClientApp:
        threading.Event().wait()
        raise AssertionError

    grid = grids.other(endless, workers=1, start_timeout=0.5)
    code, message = code_of(grid.start)
    grid.close()
    assert code == "ray-worker-start"
    assert "did not start within 0.5 s" in message


def test_a_factory_that_cannot_be_sent_is_an_error(grids: Grids) -> None:
    lock = threading.Lock()
    code, message = code_of(lambda: grids.other(lambda: lock, workers=1))
    assert code == "ray-worker-app"
    assert "cannot pickle '_thread.lock' object" in message


def test_a_factory_can_be_named(grids: Grids) -> None:
    grid = grids.other(("flwr.clientapp:ClientApp", ()), 3, workers=1)
    replies = list(grid.stream(cohort(grid)))
    grid.close()
    assert [reply.has_error() for reply in replies] == [True] * 3
    assert "train" in replies[0].error.reason


def test_a_worker_that_grows_too_big_is_replaced(grids: Grids) -> None:
    grid = grids.other(workers=1, memory_per_worker_mb=400)
    replies = list(grid.stream(cohort(grid, "grow", tuple(range(CLIENTS))) * 3))
    grid.close()
    assert len(replies) == 3 * CLIENTS
    assert not any(reply.has_error() for reply in replies)
    served = [int(reply.content["worker"]["pid"]) for reply in replies]
    assert len(set(served)) >= 2
    assert max(map(served.count, set(served))) <= 7, "64 MB a client, 400 MB a worker"


def test_a_limit_below_the_empty_worker_is_an_error(grids: Grids) -> None:
    grid = grids.other(workers=1, memory_per_worker_mb=1)
    code, message = code_of(grid.start)
    grid.close()
    assert code == "ray-worker-memory"
    assert "before its first client" in message


def test_ray_listens_on_loopback_alone(grid: RayGrid) -> None:
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = {}
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # workers of earlier tests may be on their way out
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.port] = connection.laddr.ip
    assert len(found) >= 4, "the store, the scheduler and the workers all listen somewhere"
    assert set(found.values()) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_ray_refuses_callers_without_the_token(grid: RayGrid) -> None:
    import grpc
    import ray

    address = ray.get_runtime_context().gcs_address
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=20)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        token = os.environ["RAY_AUTH_TOKEN"]
        assert call(b"", timeout=20, metadata=[("authorization", f"Bearer {token}")])


def test_a_cluster_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**options: Any) -> None:
        assert options["address"] == "10.0.0.1:6379"
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    code, message = code_of(lambda: start_ray("10.0.0.1:6379"))
    assert code == "ray-connect"
    assert "'10.0.0.1:6379'" in message


def test_a_ray_that_does_not_start_is_tried_again_and_then_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    tried = []

    def fail(**options: Any) -> None:
        tried.append(options["address"])
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    code, message = code_of(start_ray)
    assert code == "ray-start"
    assert tried == ["local"] * 3
    assert "timed out during startup" in message


# ------------------------------------------------------------------------------------------- short and large clients


def calls_of(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list to which the clients of every call to a worker are added as it is made."""
    calls: list[list[int]] = []
    send = grid._send

    def noted(seat: Any, batch: Batch, turns: Cohort) -> None:
        calls.append([turn.client for turn in batch.counting])
        send(seat, batch, turns)

    monkeypatch.setattr(grid, "_send", noted)
    return calls


def test_short_clients_go_several_to_a_call(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    grid._pace = 1e-4
    calls = calls_of(grid, monkeypatch)
    there = list(Ordered(grid).stream(cohort(grid)))
    here = list(LocalGrid(make_app(), CLIENTS).stream(cohort(LocalGrid(make_app(), CLIENTS))))
    assert sorted(map(len, calls)) == [CLIENTS // WORKERS] * WORKERS
    for ours, theirs in zip(there, here, strict=True):
        assert records.digest(ours.content["arrays"]) == records.digest(theirs.content["arrays"])


def test_long_clients_go_one_to_a_call(grid: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    grid._pace = 1.0
    calls = calls_of(grid, monkeypatch)
    first = next(stream := grid.stream(cohort(grid)))
    assert first.has_content()
    stream.close()
    assert set(map(len, calls)) == {1}


@pytest.mark.parametrize("how", ["exit", "unpicklable"])
def test_of_clients_in_one_call_the_offender_fails_alone(grid: RayGrid, how: str) -> None:
    grid._pace = 1e-4
    replies = list(grid.stream(cohort(grid, how, (2,))))
    assert list(errors(replies)) == [2]
    assert grid.crashes == ({2: 1} if how == "exit" else {})


def test_of_clients_in_one_call_those_beside_a_hanging_one_are_served(grid: RayGrid) -> None:
    list(grid.stream(cohort(grid)))
    grid._pace = 1e-4
    stream = grid.stream(cohort(grid, "hang", (1,)), timeout=60)
    served = {flower.client_of(next(stream).metadata.src_node_id) for _ in range(CLIENTS - 1)}
    assert served == set(range(CLIENTS)) - {1}, "done before it or waiting behind it, they come without it"
    stream.close()


def large_messages(grid: RayGrid, model: records.ArrayRecord, clients: int) -> list[Message]:
    content = RecordDict({"arrays": model, "config": ConfigRecord({"do": "train"})})
    return [Message(content, flower.node_of(client), "train") for client in range(clients)]


def test_a_large_model_lies_in_memory_once_and_is_stored_once(grids: Grids, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    grid = grids.other()
    stored = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: stored.append(value) or put(value))
    values = np.random.default_rng(0).normal(size=memory.LARGE // 8 + 5)
    model = records.array_record({"w": values.copy(), "b": np.ones(3)})
    for _ in range(2):  # training, and evaluation of the same arrays
        for reply in grid.stream(large_messages(grid, model, 4)):
            assert reply.content["worker"]["shared"]
            client = flower.client_of(reply.metadata.src_node_id)
            np.testing.assert_array_equal(records.view(reply.content["arrays"]["w"]), 2 * values + client)
    assert [id(record) for record in stored] == [id(model)]
    held = records.view(model["w"])
    assert not held.base.flags.owndata, "it is read where it is stored"
    grid.close()
    np.testing.assert_array_equal(records.view(model["w"]), values)
    assert records.view(model["w"]).base.flags.owndata, "and comes home in the end"


def test_large_replies_give_the_stores_pages_back(grids: Grids) -> None:
    grid = grids.other()
    size = 4 * memory.LARGE
    model = records.array_record({"w": np.ones(size // 8)})
    before = shared_bytes()
    for reply in grid.stream(large_messages(grid, model, CLIENTS)):
        assert (records.view(reply.content["arrays"]["w"]) == 2 + flower.client_of(reply.metadata.src_node_id)).all()
        del reply
    assert shared_bytes() - before < 1.5 * size, "the model's own pages, and none of the eight replies'"
    grid.close()


def shared_bytes() -> int:
    """Return the bytes of the object store that are mapped into this process and in memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssShmem"))
    return 1024 * int(line.split()[1])


# ---------------------------------------------------------------------------------------------- the cohort's window


def test_nothing_is_sent_too_far_ahead_of_the_oldest_open_message() -> None:
    local = LocalGrid(make_app(), CLIENTS)
    turns = Cohort(flower.number(cohort(local)), window=3)
    taken = [turns.next(), turns.next(), turns.next()]
    assert [turn.position for turn in taken if turn] == [0, 1, 2]
    assert turns.next() is None
    first, second, third = (turn for turn in taken if turn)
    turns.close(second)
    assert turns.next() is None
    turns.close(first)
    assert [turn.position for turn in iter(turns.next, None)] == [3, 4]
    assert [turn.position for turn in iter(lambda: turns.next(beside=replace(third, alone=True)), None)] == []
    turns.give_back([third])
    assert turns.waiting[0] is third


def test_fewer_large_models_wait_for_an_earlier_clients_reply() -> None:
    from trellis.grids import ray as grid

    def messages(size: int) -> list[Message]:
        content = RecordDict({"arrays": records.array_record({"w": np.zeros(size, np.uint8)})})
        return [Message(content, flower.node_of(client), "train") for client in range(3)]

    flower.enter_run()
    assert grid._window(messages(1000), workers=2) == 16
    assert grid._window(messages(8_000_000), workers=2) == 8
    assert grid._window(messages(80_000_000), workers=2) == 4
