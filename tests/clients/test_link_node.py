"""The node's end of the link, against a server that does what the test says: fetching, handing in, and their end."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from scripted_link import Script, abort, cancelled, goodbye, large, sent, task
from trellis.errors import DataError, GridError, RunError
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.nodes import NAME
from trellis_clients.link import agenda as link_agenda
from trellis_clients.link import connection as link_connection
from trellis_clients.link import store as link_store
from trellis_clients.link.agenda import Agenda, EndedError, TaskCancelledError
from trellis_clients.link.connection import Connection, Identity
from trellis_clients.link.lines import plain
from trellis_clients.link.store import Store, held, instance_of, name_of


@pytest.fixture
def server():
    made = Script()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(link_connection, "PAUSE_FIRST_S", 0.05)
    monkeypatch.setattr(link_connection, "PAUSE_MOST_S", 0.2)


@contextmanager
def joined(server, folder=None, counted=lambda *_: None, **identity):
    made = Connection(Identity(f"127.0.0.1:{server.port}", "n", "i", **identity), folder, counted)
    try:
        made.start()
        yield made
    finally:
        made.close()


@contextmanager
def later(seconds, function, *arguments):
    timer = threading.Timer(seconds, function, arguments)
    timer.start()
    yield
    timer.join()


@contextmanager
def within(seconds):
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


# -- fetching -------------------------------------------------------------------------------------------


def test_what_a_new_stream_does_not_bring_again_is_cancelled(server):
    """The cancellation came while nobody listened: the node leaves the task, and takes the next."""
    server.fetch.extend([abort("UNAVAILABLE")] * 1000)
    with joined(server) as node:
        first = server.stream(sent(task(1)))
        tasks = node.tasks()
        given = next(tasks)
        wanted = large(server)
        again = threading.Thread(target=lambda: server.stream(sent(task(2))), daemon=True)
        again.start()
        with later(0.3, first.put, None), pytest.raises(TaskCancelledError), within(5):
            node.payload(wanted, given.id)
        node.done(given.id)
        assert next(tasks).id == task(2).id


def test_a_server_that_does_not_know_yet_what_it_asks_cancels_nothing(server):
    """It has just come back: what the node computes is what it will ask."""
    with joined(server) as node:
        first = server.stream(sent(task(1)))
        given = next(node.tasks())
        first.put(None)
        second = server.stream(beat=False)
        second.put(pb.WorkResponse(beat=pb.Beat()))
        time.sleep(0.2)
        node.go_on(given.id)
        second.put(pb.WorkResponse(beat=pb.Beat(complete=True)))
        time.sleep(0.2)
        with pytest.raises(TaskCancelledError):
            node.go_on(given.id)


def test_a_task_that_comes_again_on_a_new_stream_goes_on(server):
    with joined(server) as node:
        first = server.stream(sent(task(1)))
        (given,) = [next(node.tasks())]
        first.put(None)
        server.stream(sent(task(1)), sent(task(2)))
        assert next(node.tasks()).id == task(2).id  # the stream was heard to its end, and task 1 is not given twice
        node.go_on(given.id)


def test_a_payload_that_no_open_task_refers_to_ends_the_task(server):
    server.fetch.append(abort("ABORTED"))
    with joined(server) as node:
        server.stream(sent(task(1)), sent(task(2)))
        tasks = node.tasks()
        given = next(tasks)
        with pytest.raises(TaskCancelledError), within(3):
            node.payload(large(server), given.id)
        node.done(given.id)
        assert next(tasks).id == task(2).id


def test_a_session_that_is_gone_is_waited_for_and_what_came_stays(server):
    """NOT_FOUND after the first part: the rest is fetched in the next session."""
    wanted = large(server)
    data = server.payloads[wanted.digest]

    def broken(_, context):
        yield pb.FetchResponse(data=data[:100_000])
        context.abort(grpc.StatusCode.NOT_FOUND, "no such session: join again")

    server.fetch.append(broken)
    with joined(server) as node:
        server.stream(sent(task(1)))
        assert node.payload(wanted, next(node.tasks()).id) == data
    assert server.fetched == [0, 100_000]


@pytest.mark.parametrize("ends", ["cancelled", "goodbye", "closed", "given up"])
def test_a_fetch_that_gets_nothing_ends_with_its_task_and_its_node(server, ends):
    """The server has stopped to send, or cannot be reached."""
    server.fetch.append(lambda _, context: [threading.Event().wait(8) for _ in [0] if context.is_active()] and ())
    with joined(server, give_up_after_s=0.7 if ends == "given up" else None) as node:
        stream = server.stream(sent(task(1)))
        given = next(node.tasks())
        end = {
            "cancelled": lambda: stream.put(cancelled(given)),
            "goodbye": lambda: stream.put(goodbye()),
            "closed": node.close,
            "given up": server.stop,
        }[ends]
        expected = {"cancelled": TaskCancelledError, "given up": GridError}.get(ends, EndedError)
        with later(0.3, end), pytest.raises(expected) as caught, within(4):
            node.payload(large(server), given.id)
    if ends == "given up":
        assert caught.value.code == "link-lost"


def test_pauses_between_fetches_double_and_start_anew_once_something_came(server):
    def some(_, context):
        yield pb.FetchResponse(data=server.payloads[wanted.digest][:1000])
        context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")

    wanted = large(server)
    server.fetch.extend([*[abort("UNAVAILABLE")] * 4, some, abort("UNAVAILABLE"), abort("UNAVAILABLE")])
    with joined(server) as node:
        asked: list[int] = []
        node._transfers._pause = lambda failures: asked.append(failures) or 0.0
        server.stream(sent(task(1)))
        node.payload(wanted, next(node.tasks()).id)
    assert asked == [0, 1, 2, 3, 0, 1, 2]
    assert server.fetched == [0] * 5 + [1000] * 3


def test_large_payloads_lie_in_the_nodes_folder_and_a_full_disk_is_the_tasks_failure(server, tmp_path):
    with joined(server, tmp_path) as node:
        server.stream(sent(task(1)))
        name = next(node.tasks()).id
        wanted = large(server, 5_000_000)
        buffer = node.payload(wanted, name)
        maps = Path("/proc/self/maps").read_text().splitlines()
        assert [line for line in maps if str(tmp_path) in line and line.endswith("(deleted)")]
        assert bytes(buffer) == server.payloads[wanted.digest]
        node._transfers._folder = tmp_path / "gone"
        with pytest.raises(RunError) as caught:
            node.payload(large(server, 5_000_001), name)
        assert caught.value.code == "node-store"


# -- handing in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["cancelled", "goodbye", "closed"])
def test_an_answer_that_the_server_lets_wait_ends_with_its_task_and_its_node(server, ends):
    """Back-pressure has no limit of time; but nobody waits for a server that has no use for the answer any more."""
    ended = threading.Event()

    def held_back(_, context):
        context.add_callback(ended.set)
        ended.wait(20)
        return pb.SubmitResponse(verdict=pb.VERDICT_ACCEPTED)

    server.submit.append(held_back)
    with joined(server) as node:
        stream = server.stream(sent(task(1)))
        given = next(node.tasks())
        end = {
            "cancelled": lambda: stream.put(cancelled(given)),
            "goodbye": lambda: stream.put(goodbye("that was\x1b[2J all\n")),
            "closed": node.close,
        }[ends]
        expected = TaskCancelledError if ends == "cancelled" else EndedError
        with later(0.5, end), pytest.raises(expected) as caught, within(4):
            node.submit(given.id, bytes(3_000_000))
        assert ended.wait(2)  # the server hears that the call is over
    assert str(caught.value) == {"cancelled": given.id, "goodbye": "that was [2J all", "closed": ""}[ends]


def test_an_answer_that_was_cut_short_is_sent_again_and_one_that_is_refused_is_not(server, caplog):
    server.submit.extend([abort("DATA_LOSS"), lambda r, _: server.take(r, pb.VERDICT_REFUSED, "no\x1b[31m\nrecords")])
    with joined(server) as node, caplog.at_level(logging.WARNING, "trellis.node"):
        server.stream(sent(task(1)))
        assert node.submit(next(node.tasks()).id, b"abc") == pb.VERDICT_REFUSED
    assert [data for _, data in server.answers] == [b"abc"]
    (line,) = [record for record in caplog.records if record.getMessage() == "answer refused"]
    assert line.reason == "no [31m records"
    assert (line.run, line.client, line.node) == ("a-run", 0, "n")


def test_an_answer_that_the_server_does_not_understand_is_an_error_with_a_code(server):
    server.submit.append(abort("INVALID_ARGUMENT", "a submission starts with its header"))
    with joined(server) as node:
        server.stream(sent(task(1)))
        with pytest.raises(DataError, match="starts with its header") as caught:
            node.submit(next(node.tasks()).id, b"abc")
    assert caught.value.code == "link-call"


def test_a_submit_whose_verdict_was_lost_is_asked_again_though_its_task_is_not_open_any_more(server):
    """Else the node would forget a state that counts."""
    streams = []

    def lost(requests, context):
        server.take(requests, pb.VERDICT_ACCEPTED)
        streams[0].put(None)
        streams.append(server.stream())  # the new stream brings nothing: the task is answered
        time.sleep(0.3)
        context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")

    server.submit.extend([lost, lambda requests, _: server.take(requests, pb.VERDICT_DUPLICATE)])
    with joined(server) as node:
        streams.append(server.stream(sent(task(1))))
        assert node.submit(next(node.tasks()).id, b"abc") == pb.VERDICT_DUPLICATE
    assert len(streams) == 2


# -- being told to stop ---------------------------------------------------------------------------------


def test_finish_ends_the_wait_for_a_server_that_is_not_there():
    made = Connection(Identity("127.0.0.1:1", "n", "i"))
    with later(0.3, made.finish), pytest.raises(EndedError) as caught, within(3):
        made.start()
    assert str(caught.value) == ""
    with within(3):
        made.close()


def test_finish_lets_an_answer_be_handed_in_but_not_for_long(server, monkeypatch):
    monkeypatch.setattr(link_agenda, "HAND_IN_S", 0.6)
    server.submit.extend([abort("UNAVAILABLE")] * 3)
    with joined(server) as node:
        server.stream(sent(task(1)), sent(task(2)))
        name = next(node.tasks()).id
        node.finish()
        assert node.submit(name, b"abc") == pb.VERDICT_ACCEPTED  # there was time for that
        server.submit.extend([abort("UNAVAILABLE")] * 1000)
        with pytest.raises(EndedError), within(3):
            node.submit(name, b"abc")
        with pytest.raises(EndedError):
            next(node.tasks())


def test_finish_takes_no_more_tasks(server):
    with joined(server) as node:
        server.stream(sent(task(1)))
        tasks = node.tasks()
        node.done(next(tasks).id)
        with later(0.2, node.finish), within(3):
            assert list(tasks) == []
    assert server.left == 1


@pytest.mark.timeout(60)
def test_a_node_is_back_soon_after_its_server(server):
    """gRPC's own pauses, which grow to many seconds, do not come on top of the node's."""
    with joined(server) as node:
        server.stream()
        server.stop()
        time.sleep(9.2)  # by its own count gRPC would try again about 4 s after this
        again = Script(server.port)
        try:
            with within(2.5):
                again.opened.get(timeout=20)
        finally:
            node.close()
            again.stop()


# -- the agenda -----------------------------------------------------------------------------------------

PLACE = pb.JoinResponse(run="a-run", client=3)


def test_a_task_that_comes_again_while_it_is_being_left_is_begun_anew():
    agenda = Agenda()
    agenda.receive(task(1), PLACE)
    tasks = agenda.tasks()
    name = next(tasks).id
    agenda.cancel(name)
    with pytest.raises(TaskCancelledError):
        agenda.go_on(name)
    agenda.receive(task(1), PLACE)
    with pytest.raises(TaskCancelledError):  # the worker is still on its way out
        agenda.go_on(name)
    agenda.done(name)
    assert next(tasks).id == name
    agenda.go_on(name)


def test_a_task_that_comes_again_before_the_worker_heard_of_its_end_goes_on():
    agenda = Agenda()
    agenda.receive(task(1), PLACE)
    name = next(agenda.tasks()).id
    agenda.cancel(name)
    agenda.receive(task(1), PLACE)
    agenda.go_on(name)
    agenda.done(name)
    agenda.finish()
    assert list(agenda.tasks()) == []


def test_tasks_cancelled_before_their_turn_are_left_out():
    agenda = Agenda()
    agenda.new_stream()
    for number in (1, 2, 3):
        agenda.receive(task(number), PLACE)
    agenda.complete()
    agenda.receive(task(4), PLACE)
    agenda.complete()
    agenda.cancel(task(1).id)
    agenda.new_stream()
    agenda.receive(task(3), PLACE)
    agenda.receive(task(4), PLACE)
    agenda.complete()
    tasks = agenda.tasks()
    assert [next(tasks).id for _ in range(2)] == [task(3).id, task(4).id]
    assert agenda.place(task(4).id).client == 3


def test_a_pause_ends_with_what_it_is_for():
    agenda = Agenda()
    agenda.receive(task(1), PLACE)
    with later(0.2, agenda.cancel, task(1).id), within(3):
        agenda.pause(task(1).id, 10.0)
    with later(0.2, agenda.end, EndedError("")), within(3):
        agenda.pause(task(2).id, 10.0)


# -- the store ------------------------------------------------------------------------------------------


def test_private_state_belongs_to_a_client(tmp_path):
    mine = Store(tmp_path, "run", "cell", 0, 8)
    mine.put("a", b"answer", b"state")
    mine.accepted("a")
    assert Store(tmp_path, "run", "cell", 0, 8).state() == b"state"
    assert Store(tmp_path, "run", "cell", 1, 8).state() is None
    assert Store(tmp_path, "run", "cell", 1, 8).answer("a") is None


def test_files_are_on_the_disk_under_their_names(tmp_path, monkeypatch):
    """A file that was renamed has its new name after a crash only if its folder was flushed too."""
    flushed, flush = [], os.fsync
    monkeypatch.setattr(
        link_store.os, "fsync", lambda fd: (flushed.append(os.readlink(f"/proc/self/fd/{fd}")), flush(fd))
    )
    store = Store(tmp_path, "run", "cell", 0, 8)
    assert {str(tmp_path), str(store.folder.parent)} <= set(flushed)
    for action in (lambda: store.put("a", b"1", b"2"), lambda: store.accepted("a")):
        flushed.clear()
        action()
        assert flushed[-1] == str(store.folder)
        assert flushed.count(str(store.folder)) == len(flushed) / 2


def test_what_comes_from_the_server_names_no_file_elsewhere(tmp_path):
    store = Store(tmp_path / "state", "../../up", "..", 0, 8)
    assert store.folder.resolve().is_relative_to((tmp_path / "state").resolve())
    for wrong in ("../out", "a/b", "", ".index", "a" * 100):
        with pytest.raises(RunError, match="task's id"):
            store.put(wrong, b"1", b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b'{"state": 1, "answers": []}', b'{"state": null, "answers": [3]}', b"\xff"]
)
def test_a_damaged_index_is_told_with_what_to_do(tmp_path, damage):
    store = Store(tmp_path, "run", "cell", 0, 8)
    (store.folder / "index.json").write_bytes(damage)
    with pytest.raises(RunError, match="remove") as caught:
        Store(tmp_path, "run", "cell", 0, 8)
    assert caught.value.code == "node-store"


def test_stores_of_old_runs_are_removed_and_nothing_else(tmp_path):
    instance = instance_of(tmp_path)
    for number in range(7):
        made = Store(tmp_path, f"run-{number}", "cell", 0, 8)
        os.utime(made.folder / "index.json", (number, number))
    foreign = tmp_path / "mine" / "notes"
    foreign.mkdir(parents=True)
    Store(tmp_path, "run-2", "cell", 0, 8)  # an old one is taken up again
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"instance", "mine", "run-2", "run-6", "run-5", "run-4"}
    assert foreign.exists() and instance_of(tmp_path) == instance


def test_one_process_holds_a_folder(tmp_path):
    code = (
        "import sys; from pathlib import Path; from trellis_clients.link.store import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="--state") as caught, held(tmp_path):
            pass
        assert caught.value.code == "node-store-held"
        other.kill()
        other.wait()
        with held(tmp_path):  # a process that dies lets go of it
            pass


def test_a_node_without_a_name_has_the_same_one_after_a_restart(tmp_path, monkeypatch):
    for host in ("web-1.example.org", "_under.score", "h" * 80, "müller", "..."):
        monkeypatch.setattr(link_store.socket, "gethostname", lambda host=host: host)
        names = {name_of(instance_of(tmp_path / "a")), name_of(instance_of(tmp_path / "a"))}
        assert len(names) == 1 and all(re.match(NAME, name) for name in names)
        assert names != {name_of(instance_of(tmp_path / "b"))}


def test_a_state_folder_that_cannot_be_used_is_told_with_a_code(tmp_path):
    (tmp_path / "file").write_text("")
    for use in (instance_of, lambda folder: held(folder).__enter__()):
        with pytest.raises(RunError) as caught:
            use(tmp_path / "file" / "state")
        assert caught.value.code == "node-store"


def test_what_others_say_is_shown_on_one_line_without_control_characters():
    assert plain("a\x1b]0;title\x07\r\nb\t c\u202e") == "a ]0;title b c"
    assert len(plain("x" * 10_000)) == 500
    assert plain(None) == ""
