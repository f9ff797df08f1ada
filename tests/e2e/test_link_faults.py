"""What a fleet survives: killed processes, a network that goes away, slow links. The result is always the same bits."""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import threading
import time
from collections import Counter

import psutil
import pytest

from deployment import SCENARIO, nodes, process, serve
from federations import lines, sha, write
from tcp_proxy import Proxy
from trellis import experiment, scenario
from trellis.deploy import allowing
from trellis.grids.grpc import Settings
from trellis.runs import read_lines
from trellis.scenario import Scenario
from trellis.wire import certificates
from trellis_clients.link.consent import Consent

FOUR = range(4)
LONG = SCENARIO.replace("lr: 0.1}", "lr: 0.1, local_epochs: 12}").replace("count: 3", "count: 6")
"""Rounds that take a moment, so that a fault can hit the middle of one."""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    return {text: sha(tmp_path_factory.mktemp("simulated"), text=text) for text in (SCENARIO, LONG)}


# -- the network ----------------------------------------------------------------------------------------


@pytest.mark.battery("F3")
@pytest.mark.parametrize("fault", ["cut", "silence"])
def test_a_network_that_goes_away_for_a_while(tmp_path, simulated, fault):
    """Two of four nodes lose the server in the middle of a round: connections break, or nothing passes any more."""
    made: list[Proxy] = []
    seconds = 2.0

    def break_it() -> None:
        (link,) = made
        if fault == "cut":
            link.cut()
        else:
            link.silent = True
        time.sleep(seconds)
        if fault == "silence":
            link.cut()  # what was stalled is lost with its connections
        link.mend()

    with nodes(tmp_path) as fleet:

        def listening(port):
            made.append(Proxy(port))
            for client in FOUR:
                fleet.start(made[0].port if client < 2 else port, client)

        def after(_, line):
            if line["round"] == 1:
                threading.Thread(target=break_it).start()

        run, outcome = serve(
            tmp_path,
            listening,
            text=LONG,
            hooks=experiment.Hooks(on_round=after),
            settings=Settings(beat_s=0.3, leave_after_s=30, give_up_after_s=60),
        )
        made[0].close()
    assert not outcome.failed
    assert outcome.summaries[0]["sha256"] == simulated[LONG]
    rows = [(row["round"], row["phase"], row["client"]) for row in lines(run, "clients.jsonl")]
    assert len(rows) == len(set(rows))  # every update counted once


@pytest.mark.battery("F4")
def test_a_slow_link_is_late_and_not_wrong(tmp_path, simulated):
    with nodes(tmp_path) as fleet:
        made: list[Proxy] = []

        def listening(port):
            made.append(Proxy(port))
            made[0].bytes_per_second = 60_000
            for client in FOUR:
                fleet.start(made[0].port if client == 0 else port, client)

        _, outcome = serve(tmp_path, listening)
        made[0].close()
    assert outcome.summaries[0]["sha256"] == simulated[SCENARIO]


# -- processes ------------------------------------------------------------------------------------------


class Fleet:
    """A server and four nodes, each a process, with TLS and tokens, as an operator starts them."""

    def __init__(self, folder, text):
        self.folder = folder
        self.scenario = write(folder, text)
        self.port = 0
        self.lines: queue.Queue[dict] = queue.Queue()
        certificates.write(folder / "certs", ["127.0.0.1"])
        self.tokens = [allowing.admit(folder / "nodes.yaml", f"node-{client}", client) for client in FOUR]
        self.processes = []
        self.said: dict[object, list[str]] = {}

    def serve(self, *arguments):
        made = process(
            "serve", *arguments, "--certs", str(self.folder / "certs"), "--nodes", str(self.folder / "nodes.yaml"),
            "--address", f"127.0.0.1:{self.port}", "--runs", str(self.folder / "runs"), "--json", "--log-json",
            "--leave-after", "60",
        )  # fmt: skip
        self.processes.append(made)
        threading.Thread(target=self._read, args=(made,), daemon=True).start()
        self.log: list[str] = []
        for line in made.stderr:
            self.log.append(line)
            if '"listening"' in line:
                self.port = json.loads(line)["port"]
                break
        self._drain(made.stderr, self.log)
        return made

    def join(self, client):
        environment = {**os.environ, "TRELLIS_TOKEN": self.tokens[client]}
        made = process(
            "join", f"127.0.0.1:{self.port}", "--ca", str(self.folder / "certs" / "ca.pem"),
            "--state", str(self.folder / f"node-{client}"), "--log-json", env=environment,
        )  # fmt: skip
        self.processes.append(made)
        self.said[made] = []
        self._drain(made.stdout, self.said[made])
        self._drain(made.stderr, self.said[made])
        return made

    def _read(self, made):
        for line in made.stdout:
            if line.startswith("{"):
                self.lines.put(json.loads(line))

    def _drain(self, pipe, into):
        """Take what a process writes: a pipe that nobody reads is full after a while, and stops it."""

        def take():
            for line in pipe:
                into.append(line)

        threading.Thread(target=take, daemon=True).start()

    def until_round(self, number):
        while True:
            line = self.lines.get(timeout=120)
            if line.get("round") == number:
                return

    def summary(self):
        (path,) = (self.folder / "runs").glob("*/*/cells/*/summary.json")
        return json.loads(path.read_text())

    def stop(self):
        for each in self.processes:
            if each.poll() is None:
                each.kill()
            each.wait(10)
            for pipe in (each.stdout, each.stderr):
                pipe.close()


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(tmp_path, LONG)
    yield made
    made.stop()


@pytest.mark.battery("F1", "F2")
def test_kill_a_node_in_its_task_and_the_server_in_its_round(fleet, simulated):
    """kill -9 of each; both are started again as they were, and the run ends with the bits of an undisturbed one."""
    server = fleet.serve(str(fleet.scenario))
    members = [fleet.join(client) for client in FOUR]
    fleet.until_round(1)
    time.sleep(0.1)  # round 2 is under way
    members[2].kill()
    members[2].wait()
    members[2] = fleet.join(2)
    fleet.until_round(3)
    time.sleep(0.1)
    server.kill()
    server.wait()
    server = fleet.serve("--resume", "latest")
    assert server.wait(120) == 0, fleet.log
    assert fleet.summary()["sha256"] == simulated[LONG]
    rows = read_lines(next((fleet.folder / "runs").glob("*/*/cells/*/metrics.jsonl")))
    assert [row["round"] for row in rows] == list(range(7))
    for member in members:
        assert member.wait(30) == 0
        assert "the run is over" in "".join(fleet.said[member])
    text = "".join(fleet.log) + "".join("".join(fleet.said[member]) for member in members)
    assert not any(token in text for token in fleet.tokens)
    events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert {"node joined", "joined", "task done"} <= {event["event"] for event in events}


@pytest.mark.battery("F6")
def test_sigterm_lets_a_task_finish_and_leaves_a_run_that_resumes(fleet, simulated):
    """A node finishes its task, or hands it back, and comes again; the server stops, and nothing is lost by either."""
    server = fleet.serve(str(fleet.scenario))
    members = [fleet.join(client) for client in FOUR]
    fleet.until_round(1)
    members[0].send_signal(signal.SIGTERM)
    assert members[0].wait(30) == 0
    members[0] = fleet.join(0)
    fleet.until_round(2)
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 130
    server = fleet.serve("--resume", "latest")
    assert server.wait(120) == 0, fleet.log
    final = fleet.summary()
    assert final["rounds"] == 6
    for member in members:
        assert member.wait(30) == 0
    failures = [row["failures"] for row in read_lines(next((fleet.folder / "runs").glob("*/*/cells/*/metrics.jsonl")))]
    assert not any(failures)
    assert final["sha256"] == simulated[LONG]


@pytest.mark.battery("F2")
def test_nodes_that_never_come_back_cost_their_updates_only(tmp_path):
    """One of four is lost in round 2: that round counts with three, and the rest of the run goes on with them."""
    with nodes(tmp_path) as fleet:
        made: list[Proxy] = []

        def listening(port):
            made.append(Proxy(port))
            lost = fleet.start(made[0].port, 1)
            while lost.connection.joined is None:  # the first round starts with three, and is to have it
                time.sleep(0.01)
            time.sleep(0.2)
            for client in (0, 2, 3):
                fleet.start(port, client)

        def after(_, line):
            if line["round"] == 1:
                made[0].cut()

        run, outcome = serve(
            tmp_path,
            listening,
            overrides=("rounds.quorum=0.7",),
            hooks=experiment.Hooks(on_round=after),
            settings=Settings(beat_s=0.3, leave_after_s=1.0, give_up_after_s=60),
            min_clients=3,
        )
    assert not outcome.failed
    by_round = {number: set() for number in (1, 2, 3)}
    for row in lines(run, "clients.jsonl"):
        if row["phase"] == "train" and row["ok"]:
            by_round[row["round"]].add(row["client"])
    assert by_round == {1: {0, 1, 2, 3}, 2: {0, 2, 3}, 3: {0, 2, 3}}
    reasons = {row["reason"] for row in lines(run, "clients.jsonl") if not row["ok"]}
    assert "its node has been gone for 1 s" in reasons


@pytest.mark.battery("F4", "F9")
@pytest.mark.slow
def test_a_round_closes_at_its_deadline_and_the_late_answer_counts_for_nothing(tmp_path):
    """Client 0 takes far longer than the deadline. Its private state goes back to what it was before."""
    with nodes(tmp_path) as fleet:

        def slow(given):
            raw = scenario.plain(Consent()(given))
            raw["trainer"]["local_epochs"] = 4000
            return scenario.validated(Scenario, raw)

        def listening(port):
            for client in FOUR:
                fleet.start(port, client, **({"changed": slow} if client == 0 else {}))

        run, outcome = serve(
            tmp_path,
            listening,
            overrides=("rounds.quorum=0.7", "rounds.deadline_s=8", "rounds.count=1", "evaluation.federated_every=0"),
        )
        assert not outcome.failed
        (late,) = [row for row in lines(run, "clients.jsonl") if not row["ok"]]
        assert (late["client"], late["reason"]) == (0, "no reply before the deadline of 8 s")
        assert 8 <= lines(run)[1]["phases"]["train"] < 9.5


def instant(fleet, kind, moments):
    """Wait for a moment in a round; return whether it came."""
    end = time.monotonic() + 20
    while time.monotonic() < end and fleet.processes[0].poll() is None:
        events = [json.loads(line)["event"] for line in fleet.log if line.startswith("{")]
        partial = any(True for _ in (fleet.folder / "runs").glob("*/*/cells/*/checkpoint/**/*.tmp"))
        if (
            (kind == "joining" and "node joined" in events)
            or (kind == "dispatching" and events.count("node joined") == len(FOUR))
            or (kind == "receiving" and "task answered" in events)
            or (kind == "checkpoint" and partial)
        ):
            time.sleep(0.0 if kind == "checkpoint" else moments.uniform(0.0, 0.1))
            return True
        time.sleep(0.0005)
    return False


@pytest.mark.battery("F1")
@pytest.mark.slow
def test_kill_the_server_at_twenty_instants(tmp_path, tmp_path_factory):
    """F1: while nodes join, while it dispatches, receives, and writes its checkpoint."""
    text = LONG.replace("count: 6", "count: 12")
    expected = sha(tmp_path_factory.mktemp("simulated"), text=text)
    fleet, moments, hits = Fleet(tmp_path, text), random.Random(0), Counter()
    try:
        server = fleet.serve(str(fleet.scenario))
        members = [fleet.join(client) for client in FOUR]
        for number in range(20):
            kind = ("dispatching", "receiving", "checkpoint", "receiving", "joining")[number % 5]
            hits[kind] += instant(fleet, kind, moments)
            if server.poll() is not None:
                break
            server.kill()
            server.wait()
            fleet.processes.remove(server)
            server = fleet.serve("--resume", "latest")
            fleet.processes.insert(0, fleet.processes.pop())
        assert server.wait(240) == 0, fleet.log
        assert min(hits[kind] for kind in ("joining", "dispatching", "receiving", "checkpoint")) >= 2, hits
        assert fleet.summary()["sha256"] == expected
        for member in members:
            assert member.wait(60) == 0
    finally:
        fleet.stop()


@pytest.mark.battery("F6")
@pytest.mark.slow
def test_a_second_sigterm_ends_at_once(tmp_path):
    """A node in the middle of a task that takes hours would finish it; told a second time, it leaves with status 1."""
    made = Fleet(tmp_path, LONG.replace("local_epochs: 12", "local_epochs: 100000"))
    try:
        server = made.serve(str(made.scenario))
        member = made.join(0)
        others = [made.join(client) for client in FOUR if client]
        while "".join(made.log).count("node joined") < len(FOUR):
            time.sleep(0.1)
        begun = psutil.Process(member.pid).cpu_times().user
        while psutil.Process(member.pid).cpu_times().user < begun + 10:  # by then it has loaded all, and trains
            assert server.poll() is None and member.poll() is None
            time.sleep(0.1)
        member.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert member.poll() is None  # its task is not done
        member.send_signal(signal.SIGTERM)
        assert member.wait(10) == 1
        assert all(other.poll() is None for other in others)
    finally:
        made.stop()
