"""Nodes and servers that lose each other, die and come back: each answer counts once, with its state."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import yaml

from deployment import SCENARIO, carry_on, nodes, process, serve
from federations import lines, sha
from trellis import experiment
from trellis.errors import GridError
from trellis.grids.grpc import Settings
from trellis.runs import Run
from trellis.wire.nodes import digest
from trellis_clients.link import connection as link_connection
from trellis_clients.link.connection import Connection, Identity
from trellis_clients.link.consent import Consent
from trellis_clients.link.store import Store
from trellis_server import checkpoint

FOUR = range(4)
QUICK = Settings(beat_s=0.3, leave_after_s=0.5, give_up_after_s=60)


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

    def remove():
        for what in (("link", "del", device), ("netns", "del", name)):
            subprocess.run(["ip", *what], check=False, capture_output=True)

    try:
        remove()  # what a run that was killed has left
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
        remove()


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

        def come_back(node, thread):
            node.connection._channel.close()
            thread.join(30)
            fleet.start(fleet.port, 2)

        def die(store, task):
            if not died and "node-2" in str(store.folder):
                died.append(task)
                node, thread = fleet.running["node-2"]
                node.connection._stopped.set()  # no word of farewell
                threading.Thread(target=come_back, args=(node, thread)).start()
                raise KeyboardInterrupt
            accepted(store, task)

        monkeypatch.setattr(Store, "accepted", die)
        _, outcome = serve(tmp_path, fleet.start_all)
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
