"""What a node survives by itself: its disk, its code, its server; and how its process ends when it is told to."""

from __future__ import annotations

import errno
import json
import logging
import signal
import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from deployment import SCENARIO, process
from scripted_link import Script, abort, goodbye, sent, setup_of, task
from trellis.deploy.node_metrics import NodeMetrics
from trellis.grids.grpc import to_wire
from trellis.wire.content import pack
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.payload import encode
from trellis_clients.link import connection as link_connection
from trellis_clients.link import training as link_training
from trellis_clients.link.connection import Identity
from trellis_clients.link.store import Store
from trellis_clients.link.training import TrainingNode
from trellis_clients.site import Cell, Site

LONG = SCENARIO.replace("name: scaffold, lr: 0.1", "name: sgd, lr: 0.1, local_epochs: 1000000").replace(
    "strategy: scaffold", "strategy: fedavg"
)


@pytest.fixture
def server():
    made = Script()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return setup_of(tmp_path_factory.mktemp("setup"))


class Worker:
    """A node in a thread whose client app notes where it started from, and does nothing else."""

    def __init__(self, server, folder, monkeypatch, **options):
        self.started_from: list[list[str]] = []
        self.during = lambda: None
        monkeypatch.setattr(link_connection, "PAUSE_FIRST_S", 0.02)
        monkeypatch.setattr(link_connection, "PAUSE_MOST_S", 0.1)
        monkeypatch.setattr(link_training, "run_client", self._train)
        self.node = TrainingNode(Identity(f"127.0.0.1:{server.port}", "n", "i"), folder, **options)
        self.end: object = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        try:
            self.end = self.node.run()
        except BaseException as error:
            self.end = error

    def _train(self, app, message, context):
        kept = context.state.config_records.get("trail")
        trail = list(kept["tasks"]) if kept else []
        self.started_from.append(trail)
        self.during()
        context.state["trail"] = ConfigRecord({"tasks": [*trail, message.metadata.message_id[-2:]]})
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message), context.state

    def ended(self):
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.end


def handed_in(server, worker, answers):
    """Wait for so many answers, and until the node is done with the last."""
    end = time.monotonic() + 60
    while len(server.answers) < answers or worker.node.connection.agenda._known:
        assert time.monotonic() < end and worker.thread.is_alive(), worker.end
        time.sleep(0.02)


def over(server, worker, stream, answers):
    """Say goodbye once so many answers were handed in, and return the node's last word."""
    handed_in(server, worker, answers)
    stream.put(goodbye())
    return worker.ended()


def scraped(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        rows = [line.rsplit(" ", 1) for line in page.read().decode().splitlines() if line and line[0] != "#"]
    return {name: float(value) for name, value in rows}


def outcomes(server):
    """For each answer that came whole its task's number, and the reason where it is a failure."""
    return [(int(header.task_id, 16), header.failure.reason) for header, _ in server.answers]


# -- where private state starts from --------------------------------------------------------------------


def test_a_task_starts_from_the_state_after_the_answer_that_the_server_names(
    server, tmp_path, monkeypatch, setup, caplog
):
    """The server went back, or dealt its clients anew: it knows which answer counts."""
    first, second = task(1).id, task(2).id
    stream_of = [
        task(1, setup),
        task(2, setup),
        task(3, setup, after=first),  # the server went back behind task 2
        task(4, setup, after=""),  # and behind all
        task(5, setup, after="9" * 32),  # an answer that this node never gave
        task(6, setup),
        task(7, setup, after=second),
    ]
    worker = Worker(server, tmp_path, monkeypatch)
    with caplog.at_level(logging.WARNING, "trellis.node"):
        assert over(server, worker, server.stream(*map(sent, stream_of)), 7) == "the run is over"
    assert worker.started_from == [[], ["01"], ["01"], [], ["04"], ["04", "05"], ["01", "02"]]
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert (warning.task, warning.reason) == (task(5).id, "9" * 32)


def test_a_node_that_is_another_client_from_now_on_starts_from_no_state(server, tmp_path, monkeypatch, setup):
    worker = Worker(server, tmp_path, monkeypatch)
    for number, client in ((1, 1), (2, 0)):
        stream = server.stream(sent(task(number, setup)))
        handed_in(server, worker, number)
        server.welcome["client"] = client
        stream.put(None)
    over(server, worker, server.stream(sent(task(3, setup))), 3)
    assert worker.started_from == [[], [], ["01"]]


def test_a_verdict_that_was_lost_with_the_connection_is_asked_for(server, tmp_path, monkeypatch, setup):
    """The server has the answer and does not ask again: the state after it counts all the same."""

    def lost(requests, context):
        server.take(requests, pb.VERDICT_ACCEPTED)
        streams[0].put(None)
        streams.append(server.stream())
        time.sleep(0.3)
        abort("UNAVAILABLE")(requests, context)

    server.submit.extend([lost, lambda requests, _: server.take(requests, pb.VERDICT_DUPLICATE)])
    worker = Worker(server, tmp_path, monkeypatch)
    streams = [server.stream(sent(task(1, setup)))]
    handed_in(server, worker, 2)
    streams[1].put(sent(task(2, setup)))
    over(server, worker, streams[1], 3)
    assert worker.started_from == [[], ["01"]]


@pytest.mark.parametrize("verdict", ["ACCEPTED", "DUPLICATE", "STALE", "REFUSED"])
def test_a_state_counts_once_the_server_says_that_the_answer_does(server, tmp_path, monkeypatch, setup, verdict):
    server.submit.append(lambda requests, _: server.take(requests, pb.Verdict.Value(f"VERDICT_{verdict}")))
    worker = Worker(server, tmp_path, monkeypatch)
    over(server, worker, server.stream(sent(task(1, setup)), sent(task(2, setup))), 2)
    counts = verdict in ("ACCEPTED", "DUPLICATE")
    assert worker.started_from == [[], ["01"] if counts else []]


def test_a_node_that_died_before_it_noted_a_verdict_asks_for_it(server, tmp_path, monkeypatch, setup):
    worker = Worker(server, tmp_path, monkeypatch)
    with monkeypatch.context() as dies:
        dies.setattr(Store, "accepted", lambda *_: None)
        over(server, worker, server.stream(sent(task(1, setup))), 1)
    server.submit.append(lambda requests, _: server.take(requests, pb.VERDICT_DUPLICATE))
    again = Worker(server, tmp_path, monkeypatch)
    over(server, again, server.stream(sent(task(2, setup))), 3)
    assert [number for number, _ in outcomes(server)] == [1, 1, 2]
    assert again.started_from == [["01"]]


# -- what goes wrong in a task --------------------------------------------------------------------------


def broken(error):
    def raises(*_, **__):
        raise error

    return raises


@pytest.mark.parametrize("where", ["__init__", "answer", "put", "state", "unsettled"])
def test_a_disk_that_fails_fails_the_task_and_not_the_node(server, tmp_path, monkeypatch, setup, where):
    worker = Worker(server, tmp_path, monkeypatch)
    with monkeypatch.context() as broke:
        broke.setattr(Store, where, broken(OSError(errno.EIO, "Input/output error")))
        stream = server.stream(sent(task(1, setup)))
        handed_in(server, worker, 1)
    stream.put(sent(task(2, setup)))
    assert over(server, worker, stream, 2) == "the run is over"
    (_, reason), (number, none) = outcomes(server)
    assert "node-store" in reason and "Input/output error" in reason
    assert (number, none) == (2, "")


def test_a_verdict_that_cannot_be_noted_is_known_all_the_same(server, tmp_path, monkeypatch, setup):
    """The disk fails while an answer is dropped, or accepted: the node goes on, with the state that counts."""
    worker = Worker(server, tmp_path, monkeypatch)
    real, fails = Store._save, []

    def save(store):
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(store)

    monkeypatch.setattr(Store, "_save", save)

    def verdict(which):
        def given(requests, _):
            fails.append(which)
            return server.take(requests, which)

        return given

    server.submit.extend([verdict(pb.VERDICT_STALE), verdict(pb.VERDICT_ACCEPTED)])
    stream = server.stream()
    for number in (1, 2, 3):
        stream.put(sent(task(number, setup)))
        handed_in(server, worker, number)
        fails.clear()
    assert over(server, worker, stream, 3) == "the run is over"
    assert worker.started_from == [[], [], ["02"]]


def test_a_fault_of_the_node_itself_is_logged_and_fails_the_task(server, tmp_path, monkeypatch, setup, caplog):
    faults = [ZeroDivisionError("here"), None]

    def changed(given):
        if (fault := faults.pop(0)) is not None:
            raise fault
        return given

    worker = Worker(server, tmp_path, monkeypatch, changed=changed)
    with caplog.at_level(logging.ERROR, "trellis.node"):
        stream = server.stream(sent(task(1, setup)), sent(task(2, setup)), sent(task(3, b"no json")))
        over(server, worker, stream, 3)
    (first, second, third) = outcomes(server)
    assert first == (1, "ZeroDivisionError: here") and second == (2, "") and "link-setup" in third[1]
    (logged,) = [record for record in caplog.records if record.exc_info]
    assert logged.exc_info[0] is ZeroDivisionError and logged.task == task(1).id


def test_a_failure_that_the_server_does_not_take_does_not_end_the_node(server, tmp_path, monkeypatch, setup):
    server.submit.append(abort("INVALID_ARGUMENT"))
    worker = Worker(server, tmp_path, monkeypatch)
    stream = server.stream(sent(task(1, b"no json")), sent(task(2, setup)))
    assert over(server, worker, stream, 1) == "the run is over"
    assert outcomes(server) == [(2, "")]


# -- what can be seen from outside ----------------------------------------------------------------------


def test_log_lines_and_metrics_say_what_the_node_is_at(server, tmp_path, monkeypatch, setup, caplog):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    metrics = NodeMetrics(f"127.0.0.1:{port}")
    worker = Worker(server, tmp_path, monkeypatch, counted=metrics.count)
    seen = []
    worker.during = lambda: (seen.append(scraped(port)), worker.node.log.info("at work"))
    with caplog.at_level(logging.INFO, "trellis.node"):
        stream = server.stream(sent(task(1, setup)))
        handed_in(server, worker, 1)
        stream.put(None)
        fetched = task(2, setup)
        server.payloads[fetched.setup.digest] = fetched.setup.inline
        fetched.setup.inline = b""
        fetched.cell = "other\x1b[2J"
        worker.node._live = None
        over(server, worker, server.stream(sent(fetched)), 2)
    during = [record for record in caplog.records if record.getMessage() == "at work"][-1]
    said = {field: getattr(during, field) for field in ("run", "cell", "round", "node", "client", "task", "kind")}
    assert said == {
        "run": "a-run", "cell": "other [2J", "round": 2, "node": "n", "client": 0, "task": task(2).id, "kind": "train",
    }  # fmt: skip
    end = scraped(port)
    assert seen[0]["trellis_node_connected"] == 1 and end["trellis_node_connected"] == 0
    assert end["trellis_node_reconnect_total"] == 1
    assert end['trellis_task_total{kind="train",verdict="accepted"}'] == 2
    assert end['trellis_task_seconds_count{kind="train"}'] == 2
    assert end["trellis_node_received_bytes_total"] == fetched.setup.size
    assert end["trellis_node_sent_bytes_total"] == sum(len(data) for _, data in server.answers)
    assert abs(end["trellis_node_last_task_time_seconds"] - time.time()) < 60
    kept = [path for path in tmp_path.glob("a-run/*/*") if path.is_file()]
    assert end["trellis_node_store_bytes"] == sum(path.stat().st_size for path in kept) > 0


# -- being told to stop ---------------------------------------------------------------------------------


@pytest.mark.battery("F6")
def test_an_answer_that_cannot_be_handed_in_waits_on_the_disk(server, tmp_path, monkeypatch, setup):
    monkeypatch.setattr("trellis_clients.link.agenda.HAND_IN_S", 0.5)
    server.submit.extend([abort("UNAVAILABLE")] * 1000)
    worker = Worker(server, tmp_path, monkeypatch)
    server.stream(sent(task(1, setup)))
    while len(server.submit) > 995:
        time.sleep(0.02)
    started = time.monotonic()
    worker.node.finish()
    assert worker.ended() == "" and time.monotonic() - started < 5
    server.submit.clear()
    again = Worker(server, tmp_path, monkeypatch)
    over(server, again, server.stream(sent(task(1, setup))), 1)
    assert outcomes(server) == [(1, "")] and again.started_from == []  # it was not computed again


def join(server, folder, *options):
    port = server.port if server is not None else 1
    return process("join", f"127.0.0.1:{port}", "--insecure", "--state", str(folder / "state"), "--log-json", *options)


def until(condition, made, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert made.poll() is None, made.stderr.read()
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def catches(made):
    """Whether a process has a handler for SIGTERM."""
    status = dict(
        line.split(":\t") for line in Path(f"/proc/{made.pid}/status").read_text().splitlines() if ":\t" in line
    )
    return bool(int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1)


def stopped(made, seconds, sent_at=None):
    """End a process that was told to stop; return its status and the last line of its output."""
    started = sent_at or time.monotonic()
    status = made.wait(seconds + 20)
    assert time.monotonic() - started < seconds
    return status, made.stdout.read().splitlines()[-1:]


@pytest.fixture
def ended():
    made = []
    yield made.append
    for each in made:
        each.kill()
        each.wait()
        for pipe in (each.stdout, each.stderr):
            pipe.close()


@pytest.mark.battery("F6")
@pytest.mark.parametrize("moment", ["before torch", "before the first join"])
def test_sigterm_ends_a_node_that_has_no_server_yet(tmp_path, ended, moment):
    made = join(None, tmp_path, "--stopped-status", "143")
    ended(made)
    if moment == "before torch":
        until(lambda: catches(made), made)
        assert "libtorch" not in Path(f"/proc/{made.pid}/maps").read_text()
    else:
        threading.Thread(target=made.stderr.readline, daemon=True).start()
        until(lambda: (tmp_path / "state" / "lock").exists(), made)
        time.sleep(1.0)
    made.send_signal(signal.SIGTERM)
    assert stopped(made, 5) == (143, ["stopped"])


def busy(server, folder):
    """Send a task that never ends, and wait until the node is at it."""
    setup = setup_of(folder, LONG)
    each = json.loads(setup)["scenario"]
    arrays = to_wire(RecordDict({"arrays": Site(Cell(each, 0)).initial()}))["arrays"]
    made = task(1, setup)
    data = pack({"record": arrays})
    made.records[0].payload.CopyFrom(encode(data)[0])
    server.payloads[made.records[0].payload.digest] = data
    made.records[0].payload.inline = b""
    server.stream(sent(made))
    return made


@pytest.mark.battery("F6")
@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_in_a_task_hands_it_back_and_a_second_one_ends_at_once(server, tmp_path, ended, times):
    """The task would take for ever. It is handed back within the time there is; a second signal waits for nothing."""
    made = join(server, tmp_path, "--stopped-status", "143", "--grace", "4")
    ended(made)
    busy(server, tmp_path)
    until(lambda: server.fetched, made)
    time.sleep(3.0)
    made.send_signal(signal.SIGTERM)
    sent_at = time.monotonic()
    time.sleep(1.0)
    assert made.poll() is None
    if times == 2:
        made.send_signal(signal.SIGTERM)
        assert stopped(made, 2.5, sent_at)[0] == 1
        assert server.left == 0
    else:
        assert stopped(made, 6.0, sent_at) == (143, ["stopped"])
        assert server.left == 1


@pytest.mark.battery("F6")
@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_ends_a_device_and_a_second_one_at_once(server, tmp_path, ended, times):
    """The server does not answer Leave: a device waits a second for that, and not if it is told again."""
    release = threading.Event()
    made = join(server, tmp_path, "--edge", "--serve", "127.0.0.1:0")
    ended(made)
    server.stream()
    server.on_leave = lambda: release.wait(20)
    made.send_signal(signal.SIGTERM)
    sent_at = time.monotonic()
    if times == 2:
        time.sleep(0.4)
        made.send_signal(signal.SIGTERM)
        assert stopped(made, 1.0, sent_at)[0] == 1
    else:
        assert stopped(made, 5.0, sent_at) == (0, ["stopped"])
    release.set()
