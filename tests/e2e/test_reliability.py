"""Cases of the fault and bad-input batteries that need parts of their own: clocks, disks, credentials, strange nodes.

The page docs/reliability.md lists every case of the batteries with its test, wherever it stands.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from cryptography import x509
from flwr.app import Message, RecordDict

from deployment import SCENARIO, carry_on, nodes, process, serve
from federations import lines, sha
from tcp_proxy import Proxy
from trellis import experiment, flower, records, scenario
from trellis.deploy import allowing
from trellis.deploy.joining import Where
from trellis.deploy.metrics import ServerMetrics
from trellis.deploy.node_metrics import NodeMetrics
from trellis.deploy.serving import link_settings
from trellis.errors import GridError, RunError
from trellis.grids.grpc import GrpcGrid, Settings
from trellis.runs import Run, read_status
from trellis.wire import certificates
from trellis.wire.nodes import digest, fingerprint
from trellis_clients.link import connection as link_connection
from trellis_clients.link.connection import Connection, Identity
from trellis_clients.link.consent import Consent
from trellis_clients.link.store import Store
from trellis_clients.link.store import write as write_whole
from trellis_server import checkpoint

ROOT = Path(__file__).resolve().parents[2]
FOUR = range(4)
QUICK = Settings(beat_s=0.3, leave_after_s=0.5, give_up_after_s=60)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    return sha(tmp_path_factory.mktemp("simulated"), text=SCENARIO)


ODD = """\
import os
import threading
import time
from pathlib import Path

from trellis.registry import register
from trellis_clients.trainer import Trainer, TrainerConfig


@register("trainers", "odd", summary="s", paper="p", takes=("image",), sends="weights")
class Odd(Trainer):
    class Config(TrainerConfig):
        gone: str = ""
        prints: int = 0

    def fit(self, model, data, state, turn):
        if turn.client == 1 and self.config.gone and Path(self.config.gone).exists():
            raise RuntimeError("gone")
        if turn.client == 1 and self.config.prints:
            for _ in range(self.config.prints):
                os.write(1, b"x" * 1_000_000)
        if turn.client == 2 and self.config.prints:
            threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
        if turn.client == 3 and self.config.prints:
            raise ValueError("no disk")
        return super().fit(model, data, state, turn)
"""


def odd(folder, **options):
    """Write a scenario whose trainer stands in a file, and return its text and the consent to run it."""
    folder.mkdir(exist_ok=True)
    (folder / "odd.py").write_text(ODD)
    given = yaml.safe_load(SCENARIO)
    given |= {"trainer": {"name": "odd.py:Odd", "lr": 0.1, **options}, "strategy": "fedavg"}
    return yaml.safe_dump(given), Consent([digest(ODD.encode())], folder)


# -- clients that fail ----------------------------------------------------------------------------------


@pytest.mark.battery("F2")
def test_a_run_that_loses_a_client_has_the_weights_of_its_survivors(tmp_path):
    """One of four is lost in round 2: the weights are those of a simulation in which it fails from then on."""
    gone = tmp_path / "gone"
    text, consent = odd(tmp_path, gone=str(gone))
    quorum = ("rounds.quorum=0.7", "evaluation.federated_every=0")

    def fail(_, line):
        if line["round"] == 1:
            gone.touch()

    flower.quiet()
    (tmp_path / "odd.yaml").write_text(text)
    current = Run.create(tmp_path / "simulated", scenario.load(tmp_path / "odd.yaml", quorum))
    expected = experiment.execute(current, experiment.Hooks(on_round=fail)).summaries[0]["sha256"]
    gone.unlink()
    whole = sha(tmp_path, quorum, text)
    made: list[Proxy] = []
    with nodes(tmp_path) as fleet:

        def listening(port):
            made.append(Proxy(port))
            for client in FOUR:
                fleet.start(made[0].port if client == 1 else port, client, changed=consent)

        def cut(_, line):
            if line["round"] == 1:
                made[0].cut()

        hooks = experiment.Hooks(on_round=cut)
        run, outcome = serve(tmp_path, listening, text, quorum, hooks, QUICK, min_clients=3)
    assert outcome.summaries[0]["sha256"] == expected != whole
    assert [row["replies"] for row in lines(run)[1:]] == [4, 3, 3]


LATE = """\
import time
from pathlib import Path

from trellis.registry import register
from trellis_clients.trainers.basic.scaffold import Scaffold


@register("trainers", "late", summary="s", paper="p", takes=("image",), sends="scaffold", strategies=("scaffold",))
class Late(Scaffold):
    class Config(Scaffold.Config):
        fault: str

    def fit(self, model, data, state, turn):
        metrics = super().fit(model, data, state, turn)
        if turn.client == 1 and turn.round == 2:
            if Path(self.config.fault).read_text() == "raise":
                raise RuntimeError("lost")
            time.sleep(2.5)
        return metrics
"""


@pytest.mark.battery("F4", "B7")
def test_an_answer_after_the_deadline_leaves_no_trace_in_the_clients_state(tmp_path):
    """An answer to a closed round, from a node that was not told: refused, and its private state is as before."""
    fault = tmp_path / "fault"
    (tmp_path / "late.py").write_text(LATE)
    given = yaml.safe_load(SCENARIO) | {"trainer": {"name": "late.py:Late", "lr": 0.1, "fault": str(fault)}}
    overrides = ("rounds.quorum=0.7", "rounds.deadline_s=2", "evaluation.federated_every=0")
    fault.write_text("raise")
    expected = sha(tmp_path, overrides, yaml.safe_dump(given))
    fault.write_text("late")
    with nodes(tmp_path) as fleet:

        def listening(port):
            consent = Consent([digest(LATE.encode())], tmp_path)
            for client in FOUR:
                node = fleet.start(port, client, changed=consent)
                handle = node.connection._handle
                node.connection._handle = lambda event, handle=handle: (
                    None if event.WhichOneof("event") == "cancel" else handle(event)
                )

        run, outcome = serve(tmp_path, listening, yaml.safe_dump(given), overrides)
    assert outcome.summaries[0]["sha256"] == expected
    assert [row["replies"] for row in lines(run)[1:]] == [4, 3, 4]
    ((client, reason),) = {(r["client"], r["reason"]) for r in lines(run, "clients.jsonl") if not r["ok"]}
    assert (client, reason) == (1, "no reply before the deadline of 2 s")


@pytest.mark.battery("F9")
def test_code_of_a_client_that_raises_prints_or_leaves_threads_behind(tmp_path, capfd):
    """One client prints 20 MB, one leaves a thread behind each round, one raises: only the last fails, by itself."""
    text, consent = odd(tmp_path, prints=20)
    with nodes(tmp_path) as fleet:
        run, outcome = serve(
            tmp_path,
            lambda port: [fleet.start(port, client, changed=consent) for client in FOUR],
            text,
            ("rounds.quorum=0.7", "rounds.count=2"),
        )
    assert len(capfd.readouterr().out) >= 40_000_000
    assert not outcome.failed
    failed = {(row["client"], row["reason"]) for row in lines(run, "clients.jsonl") if not row["ok"]}
    assert failed == {(3, "ValueError: no disk")}
    assert [row["replies"] for row in lines(run)[1:]] == [3, 3]


@pytest.mark.battery("F11")
def test_when_all_clients_are_gone_the_run_ends_and_resumes(tmp_path, simulated):
    """All nodes leave after round 1: the server ends with a code, its port is free, and the run can be resumed."""
    ports: list[int] = []
    with nodes(tmp_path) as fleet:

        def listening(port):
            ports.append(port)
            for client in FOUR:
                fleet.start(port, client)

        def leave(_, line):
            if line["round"] == 1:
                for node, _ in fleet.running.values():
                    node.finish()

        settings = Settings(beat_s=0.3, leave_after_s=0.5, give_up_after_s=1.0)
        run, outcome = serve(tmp_path, listening, hooks=experiment.Hooks(on_round=leave), settings=settings)
        (error,) = outcome.failed.values()
        assert error.code in ("no-clients", "quorum-missed")
        socket.create_server(("127.0.0.1", ports[0])).close()
    with nodes(tmp_path) as fleet:
        outcome = carry_on(Run.open(run.path), lambda port: [fleet.start(port, client) for client in FOUR])
    assert outcome.summaries[0]["sha256"] == simulated


# -- the network ----------------------------------------------------------------------------------------


@pytest.mark.battery("F3")
def test_answers_that_come_twice_and_out_of_order_count_once(tmp_path, simulated):
    """Every answer is sent three times, among answers to earlier tasks: the bits are those of an orderly run."""
    verdicts: list[int] = []
    with nodes(tmp_path) as fleet:

        def listening(port):
            for client in FOUR:
                node = fleet.start(port, client)
                submit, sent = node.connection._calls["Submit"].future, []

                def again(parts, submit=submit, sent=sent, node=node, **options):
                    sent.append(list(parts))
                    response = None
                    for old in [*sent[-3:-1], sent[-1], *sent[-3:]]:
                        old[0].header.session = node.connection.joined.session
                        answered = submit(iter(old), timeout=30)
                        verdicts.append(answered.result().verdict)
                        response = response or (answered if old is sent[-1] else None)
                    return response

                node.connection._calls["Submit"] = SimpleNamespace(future=again)

        run, outcome = serve(tmp_path, listening)
    assert outcome.summaries[0]["sha256"] == simulated
    rows = [(row["round"], row["phase"], row["client"]) for row in lines(run, "clients.jsonl")]
    assert len(rows) == len(set(rows))
    assert verdicts.count(1) == len(rows)
    assert verdicts.count(2) >= 2 * len(rows)


@pytest.mark.battery("F3")
def test_pauses_between_tries_grow_to_a_limit_and_are_drawn_at_random(monkeypatch, caplog):
    """A node without a server tries again after pauses below 20 s that double and are drawn at random."""
    assert link_connection.PAUSE_MOST_S <= 20.0
    monkeypatch.setattr(link_connection, "PAUSE_FIRST_S", 0.01)
    monkeypatch.setattr(link_connection, "PAUSE_MOST_S", 0.05)
    drawn: dict[int, list[float]] = {0: [], 1: []}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for number in drawn:
        with caplog.at_level(logging.INFO, "trellis.node"):
            caplog.clear()
            lost = Connection(Identity(f"127.0.0.1:{port}", "n", "i", give_up_after_s=0.8))
            with pytest.raises(GridError) as caught:
                lost.start()
            lost.close()
        assert caught.value.code == "link-lost"
        drawn[number] = [record.pause for record in caplog.records if hasattr(record, "pause")]
    for pauses in drawn.values():
        assert len(pauses) >= 6
        assert all(pause <= 0.05 for pause in pauses)
        assert pauses[0] <= 0.01
        assert max(pauses) > 0.01
    assert drawn[0][:6] != drawn[1][:6]


@contextlib.contextmanager
def namespace(name, subnet):
    """A network namespace behind a pair of virtual interfaces; yields the device on this side and its address."""
    device = f"{name}-0"

    def do(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        do("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces are not permitted here")
    try:
        do("link", "add", device, "type", "veth", "peer", "name", f"{name}-1", "netns", name)
        do("address", "add", f"{subnet}.1/24", "dev", device)
        do("link", "set", device, "up")
        do("-n", name, "address", "add", f"{subnet}.2/24", "dev", f"{name}-1")
        do("-n", name, "link", "set", f"{name}-1", "up")
        yield device, f"{subnet}.1"
    finally:
        subprocess.run(["ip", "link", "del", device], check=False, capture_output=True)
        do("netns", "del", name)


@pytest.mark.slow
@pytest.mark.battery("F3")
def test_a_network_that_is_down_for_half_a_minute(tmp_path):
    """Two nodes in another network namespace lose the server for 30 s in mid-round: same bits, each update once."""
    text = SCENARIO.replace("lr: 0.1}", "lr: 0.1, local_epochs: 12}").replace("count: 3", "count: 4")
    expected = sha(tmp_path, text=text)
    made = []
    with namespace("trellis-f3", "10.213.77") as (device, address), nodes(tmp_path) as fleet:

        def listening(port):
            for client in FOUR:
                if client < 2:
                    made.append(
                        process(
                            "join", f"{address}:{port}", "--insecure", "--insecure-beyond-loopback", "--log-json",
                            "--node", f"far-{client}",
                            "--node-config", f"client={client}", "--state", str(tmp_path / f"far-{client}"),
                            inside="trellis-f3",
                        )
                    )  # fmt: skip
                else:
                    fleet.start(port, client, address=f"{address}:{port}")

        def part():
            subprocess.run(["ip", "link", "set", device, "down"], check=True)
            time.sleep(30)
            subprocess.run(["ip", "link", "set", device, "up"], check=True)

        def after(_, line):
            if line["round"] == 1:
                threading.Thread(target=part).start()

        settings = Settings(f"{address}:0", beat_s=0.5, leave_after_s=120, give_up_after_s=120)
        run, outcome = serve(tmp_path, listening, text, hooks=experiment.Hooks(on_round=after), settings=settings)
        logs = [each.communicate(timeout=60)[1] for each in made]
    assert outcome.summaries[0]["sha256"] == expected
    rows = [(row["round"], row["phase"], row["client"]) for row in lines(run, "clients.jsonl")]
    assert len(rows) == len(set(rows))
    pauses = [yaml.safe_load(line)["pause"] for log in logs for line in log.splitlines() if '"pause"' in line]
    assert pauses
    assert max(pauses) <= 20


@pytest.mark.battery("F3", "F2")
def test_a_node_that_dies_before_it_could_note_that_its_answer_counts(tmp_path, simulated, monkeypatch):
    """Killed between the server's word and its own note, a node asks on its return; its private state is not lost."""
    accepted, died = Store.accepted, []
    with nodes(tmp_path) as fleet:
        ports: list[int] = []

        def listening(port):
            ports.append(port)
            for client in FOUR:
                fleet.start(port, client)

        def come_back(node, thread):
            node.connection._channel.close()
            thread.join(30)
            fleet.start(ports[0], 2)

        def die(store, task):
            if not died and "node-2" in str(store.folder):
                died.append(task)
                node, thread = fleet.running["node-2"]
                node.connection._stopped.set()  # no word of farewell
                threading.Thread(target=come_back, args=(node, thread)).start()
                raise KeyboardInterrupt
            accepted(store, task)

        monkeypatch.setattr(Store, "accepted", die)
        _, outcome = serve(tmp_path, listening)
    assert died
    assert outcome.summaries[0]["sha256"] == simulated


@pytest.mark.battery("F1", "F2")
def test_server_and_node_are_killed_between_the_checkpoint_and_the_nodes_note(tmp_path, monkeypatch):
    """The checkpoint tells the server that is back which answers counted, and it tells the node: same bits."""
    overrides = ("evaluation.federated_every=0",)
    expected = sha(tmp_path, overrides, SCENARIO)
    accepted, seen = Store.accepted, []

    with nodes(tmp_path) as fleet:

        def die(store, task):
            if "node-2" in str(store.folder) and task not in seen:
                seen.append(task)
                if len(seen) == 2:
                    fleet.running["node-2"][0].connection._stopped.set()  # no word of farewell
                    raise KeyboardInterrupt
            accepted(store, task)

        def killed(_, line):
            if line["round"] == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(Store, "accepted", die)
        runs = []
        with pytest.raises(KeyboardInterrupt):
            serve(
                tmp_path,
                lambda port: [fleet.start(port, client) for client in FOUR],
                overrides=overrides,
                hooks=experiment.Hooks(on_cell=lambda folder, _: runs.append(folder.path), on_round=killed),
            )
    assert len(seen) == 2
    with nodes(tmp_path) as fleet:
        run = Run.open(runs[0].parents[1])
        outcome = carry_on(run, lambda port: [fleet.start(port, client) for client in FOUR])
    assert outcome.summaries[0]["sha256"] == expected


@pytest.mark.battery("F1", "F2")
def test_a_round_that_is_done_again_without_a_client_leaves_no_trace_of_its_lost_answer(tmp_path, monkeypatch):
    """The server is killed before the checkpoint of round 2, and client 1 is away when it asks again."""
    fault = tmp_path / "fault"
    (tmp_path / "late.py").write_text(LATE)
    given = yaml.safe_load(SCENARIO) | {"trainer": {"name": "late.py:Late", "lr": 0.1, "fault": str(fault)}}
    overrides = ("rounds.quorum=0.7", "evaluation.federated_every=0")
    fault.write_text("raise")
    expected = sha(tmp_path, overrides, yaml.safe_dump(given))
    fault.write_text("late")
    consent = Consent([digest(LATE.encode())], tmp_path)
    save, runs = checkpoint.save, []

    def killed(folder, snapshot, keep):
        if snapshot.round == 2:
            raise KeyboardInterrupt
        save(folder, snapshot, keep)

    with nodes(tmp_path) as fleet, monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            serve(
                tmp_path,
                lambda port: [fleet.start(port, client, changed=consent) for client in FOUR],
                yaml.safe_dump(given),
                overrides,
                experiment.Hooks(on_cell=lambda folder, _: runs.append(folder.path)),
            )
    with nodes(tmp_path) as fleet:
        ports: list[int] = []

        def listening(port):
            ports.append(port)
            for client in (0, 2, 3):
                fleet.start(port, client, changed=consent)

        def come_back(_, line):
            if line["round"] == 2:
                node = fleet.start(ports[0], 1, changed=consent)
                while node.connection.joined is None:
                    time.sleep(0.01)
                time.sleep(0.3)

        run = Run.open(runs[0].parents[1])
        outcome = carry_on(run, listening, experiment.Hooks(on_round=come_back), QUICK, min_clients=3)
    assert [row["replies"] for row in lines(run)[1:]] == [4, 3, 4]
    assert outcome.summaries[0]["sha256"] == expected


# -- disks ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, megabytes=8):
    """A disk of its own; yields a function that fills it, and one that makes a folder read-only or mends that."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting is not permitted here")

    def fill():
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def protect(path, on):
        if on:
            subprocess.run(["mount", "--bind", path, path], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        else:
            subprocess.run(["umount", path], check=True)

    try:
        yield fill, protect
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.battery("F5")
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_no_checkpoint(tmp_path, simulated, fault):
    """The server's disk is full or read-only after round 1: a clear code, nothing half-written, and it resumes."""
    disk = tmp_path / "disk"
    with small_disk(disk) as (fill, protect):

        def after(_, line):
            if line["round"] == 1:
                fill() if fault == "full" else protect(folder, True)

        flower.quiet()
        (disk / "s.yaml").write_text(SCENARIO)
        run = Run.create(disk / "runs", scenario.load(disk / "s.yaml"))
        folder = run.path / "cells" / "main-seed0" / "checkpoint"
        with pytest.raises(RunError, match="resumed") as caught:
            experiment.execute(run, experiment.Hooks(on_round=after))
        assert caught.value.code == "run-disk"
        assert ("No space" if fault == "full" else "Read-only") in str(caught.value)
        (disk / "filler").unlink() if fault == "full" else protect(folder, False)
        outcome = experiment.execute(Run.open(run.path))
        assert outcome.summaries[0]["sha256"] == simulated
        assert [row["round"] for row in lines(run)] == [0, 1, 2, 3]
        assert read_status(run.path)["state"] == "complete"


@pytest.mark.battery("F5")
def test_a_node_whose_disk_is_full_fails_by_itself_until_there_is_room(tmp_path):
    """A node cannot keep its answer: its task fails with a code, nothing half-written stays, later rounds count it."""
    disk = tmp_path / "node-2"
    with small_disk(disk, 1) as (fill, _), nodes(tmp_path) as fleet:

        def after(_, line):
            if line["round"] == 1:
                fill()
            if line["round"] == 2:
                (disk / "filler").unlink()

        run, outcome = serve(
            tmp_path,
            lambda port: [fleet.start(port, client) for client in FOUR],
            overrides=("rounds.quorum=0.7", "evaluation.federated_every=0"),
            hooks=experiment.Hooks(on_round=after),
        )
        assert not outcome.failed
        rows = lines(run, "clients.jsonl")
        assert [row["replies"] for row in lines(run)[1:]] == [4, 3, 4]
        ((client, reason),) = {(row["client"], row["reason"]) for row in rows if not row["ok"]}
        assert client == 2
        assert "node-store" in reason
        assert "No space left" in reason
        kept = [path.name for path in disk.rglob("*") if path.is_file()]
        assert not [name for name in kept if name.startswith(".")]  # no half-written file
        assert sum(name.endswith(".answer") for name in kept) == 2


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "index.json"
    write_whole(path, b"before")

    def full(_):
        assert path.read_bytes() == b"before"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trellis_clients.link.store.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["index.json"]


# -- clocks ---------------------------------------------------------------------------------------------


def message(client=0):
    content = RecordDict({"arrays": records.array_record({"w": np.zeros(3, np.float32)})})
    return Message(content, flower.node_of(client), "train")


@pytest.mark.battery("F7")
@pytest.mark.parametrize("jump", [600, -600])
def test_a_clock_that_jumps_by_ten_minutes_moves_no_deadline(monkeypatch, jump):
    """The wall clock is set by ten minutes, either way, in mid-round: the round closes at its deadline."""
    with GrpcGrid(1, QUICK, min_clients=1) as grid:
        identity = Identity(f"127.0.0.1:{grid.link.port}", "n", "i", client=0)
        idle = Connection(identity)
        idle.start()
        list(grid.get_node_ids())
        real, started = time.time, time.monotonic()
        threading.Timer(0.3, lambda: monkeypatch.setattr(time, "time", lambda: real() + jump)).start()
        (reply,) = grid.stream([message()], timeout=1.6)
        took = time.monotonic() - started
        assert abs(time.time() - real() - jump) < 1
        idle.close()
    assert reply.error.reason == "no reply before the deadline of 1.6 s"
    assert 1.5 <= took < 3.0


@pytest.mark.battery("F7")
def test_nothing_on_the_link_waits_by_the_wall_clock(tmp_path):
    """Only logs, metrics, the last day of credentials and certificates read it; they suit a clock ten minutes late."""
    reads = set()
    folders = [
        "platform/trellis/grids",
        "platform/trellis/wire",
        "platform/trellis/deploy",
        "clients/trellis_clients/link",
    ]
    for path in (path for folder in folders for path in (ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "time.time",
                "datetime.now",
                "datetime.utcnow",
            ):
                reads.add(path.name)
    assert reads <= {"nodes.py", "allowing.py", "certificates.py", "logs.py", "metrics.py", "node_metrics.py"}
    certificates.write(tmp_path, ["localhost"])
    for name in ("ca", "server"):
        made = x509.load_pem_x509_certificate((tmp_path / f"{name}.pem").read_bytes())
        assert made.not_valid_before_utc < datetime.now(UTC) - timedelta(minutes=10)


# -- who gets in ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    """Two authorities, each with a server's and a node's certificate."""
    folder = tmp_path_factory.mktemp("authorities")
    certificates.write(folder / "ours", ["127.0.0.1"], ["camera", "outcast"])
    certificates.write(folder / "other", ["127.0.0.1"], ["camera"])
    certificates.write(folder / "elsewhere", ["cloud.example"])
    return folder


def outcome_of(port, node="", **identity):
    """Return the client that a node with this identity becomes, or the code it is refused with."""
    made = Connection(Identity(f"127.0.0.1:{port}", node, "i", give_up_after_s=0.5, **identity))
    try:
        return made.start().client
    except GridError as error:
        return error.code
    finally:
        made.close()


@pytest.mark.battery("B6")
def test_under_mutual_tls_a_node_shows_a_certificate_of_the_right_authority(tmp_path, authorities):
    """No certificate, one of another authority, one revoked or not on the list: out. The right one needs no token."""
    ours, other = authorities / "ours", authorities / "other"
    allow = tmp_path / "nodes.yaml"
    listed = {
        "camera": {"client": 1, "certificate": fingerprint((ours / "camera.pem").read_bytes())},
        "outcast": {"certificate": fingerprint((ours / "outcast.pem").read_bytes()), "revoked": True},
    }
    allow.write_text(yaml.safe_dump({"nodes": listed}))
    token = allowing.admit(allow, "hospital", 0)
    settings = link_settings(
        "127.0.0.1:0",
        certificate=ours / "server.pem",
        key=ours / "server.key",
        authority=ours / "ca.pem",
        nodes=allow,
        beat_s=0.3,
    )

    def tls(certificate=None):
        return Where("x:1", ca=ours / "ca.pem", certificate=certificate).credentials()

    with GrpcGrid(3, settings) as grid:
        port = grid.link.port
        assert outcome_of(port, channel_credentials=tls(ours / "camera.pem")) == 1
        assert outcome_of(port, channel_credentials=tls(), token=token) == "link-lost"
        assert outcome_of(port, channel_credentials=tls(other / "camera.pem"), token=token) == "link-lost"
        assert outcome_of(port, channel_credentials=tls(ours / "outcast.pem")) == "link-refused"
        assert outcome_of(port, channel_credentials=tls(ours / "server.pem")) in ("link-refused", "link-lost")
        assert [node.name for node in grid.link.nodes.values()] == ["camera"]


@pytest.mark.battery("B6")
def test_another_host_name_an_expired_token_and_old_tls_are_refused(tmp_path, authorities):
    """The server's certificate names another host; the token ended yesterday, or is another node's; TLS 1.1: out."""
    ours, elsewhere = authorities / "ours", authorities / "elsewhere"
    allow = tmp_path / "nodes.yaml"
    token = allowing.admit(allow, "a")
    late = allowing.admit(allow, "b", expires=(datetime.now(UTC) - timedelta(days=1)).date().isoformat())

    def server(folder):
        return link_settings("127.0.0.1:0", certificate=folder / "server.pem", key=folder / "server.key", nodes=allow)

    with GrpcGrid(2, server(elsewhere)) as grid:
        tls = Where("x:1", ca=elsewhere / "ca.pem").credentials()
        assert outcome_of(grid.link.port, channel_credentials=tls, token=token) == "link-lost"
    with GrpcGrid(2, server(ours)) as grid:
        tls = Where("x:1", ca=ours / "ca.pem").credentials()
        assert outcome_of(grid.link.port, channel_credentials=tls, token=late) == "link-refused"
        assert outcome_of(grid.link.port, channel_credentials=tls, token=token) == 0
        assert outcome_of(grid.link.port, node="b", channel_credentials=tls, token=token) == "link-refused"
        for version, welcome in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
            context = ssl.create_default_context(cafile=str(ours / "ca.pem"))
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.set_alpn_protocols(["h2"])
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = version
            with (
                socket.create_connection(("127.0.0.1", grid.link.port)) as plain,
                contextlib.nullcontext() if welcome else pytest.raises((ssl.SSLError, ConnectionError)),
                context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
            ):
                assert secure.version() == "TLSv1.2"


class Recorder(Proxy):
    """Keeps what nodes send."""

    heard = b""

    def _pump(self, source, sink):
        if any(source is near for near, _ in self._pairs):
            receive = source.recv

            class Tap:
                def recv(_, size):  # noqa: N805
                    data = receive(size)
                    self.heard += data
                    return data

                def shutdown(_, how):  # noqa: N805
                    source.shutdown(how)

            super()._pump(Tap(), sink)
        else:
            super()._pump(source, sink)


@pytest.mark.battery("B6")
def test_what_was_recorded_on_the_way_opens_nothing(tmp_path, authorities):
    """The bytes of a node's whole visit are sent once more: no session, no answer comes of it."""
    ours, allow = authorities / "ours", tmp_path / "nodes.yaml"
    token = allowing.admit(allow, "a")
    events: list[str] = []
    settings = link_settings("127.0.0.1:0", certificate=ours / "server.pem", key=ours / "server.key", nodes=allow)
    with GrpcGrid(1, settings, counted=lambda event, _: events.append(event)) as grid:
        recorder = Recorder(grid.link.port)
        tls = Where("x:1", ca=ours / "ca.pem").credentials()
        assert outcome_of(recorder.port, channel_credentials=tls, token=token) == 0
        recorder.close()
        assert events.count("join") == 1
        assert len(recorder.heard) > 500
        assert token.encode() not in recorder.heard
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", grid.link.port), timeout=10) as replay:
                replay.sendall(recorder.heard)
                with contextlib.suppress(ConnectionError):
                    while replay.recv(4096):  # until the server ends it
                        pass
        assert events.count("join") == 1
        assert outcome_of(grid.link.port, channel_credentials=tls, token=token) == 0


# -- what can be seen from outside ----------------------------------------------------------------------


def scraped(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        rows = [line.rsplit(" ", 1) for line in page.read().decode().splitlines() if line and line[0] != "#"]
    return {name: float(value) for name, value in rows}


def test_prometheus_finds_what_both_sides_counted(tmp_path):
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    server, node = ServerMetrics(f"127.0.0.1:{ports[0]}"), NodeMetrics(f"127.0.0.1:{ports[1]}")
    seen = {}
    with nodes(tmp_path) as fleet:

        def listening(port):
            for client in FOUR:
                fleet.start(port, client, **({"counted": node.count} if client == 0 else {}))

        def after(_, line):
            if line["round"] == 1:
                seen.update(scraped(ports[0]))

        serve(
            tmp_path,
            listening,
            overrides=("rounds.count=2", "model.hidden=[128]"),  # too large to travel inside the task
            hooks=experiment.Hooks(on_round=after),
            counted=server.count,
        )
    end = scraped(ports[0])
    for client in FOUR:
        assert end[f'trellis_join_total{{node="node-{client}"}}'] == 1
        for way in ("sent", "received"):
            name = f'trellis_{way}_total{{node="node-{client}"}}'
            assert 0 < seen[name] < end[name]
    there = scraped(ports[1])
    assert there['trellis_task_total{kind="train",verdict="accepted"}'] == 2
