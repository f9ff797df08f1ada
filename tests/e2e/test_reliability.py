"""Clients that die, run strange code or are all gone, and what an operator sees of it.

The page docs/reliability.md lists every case of the batteries with its test, wherever it stands.
"""

from __future__ import annotations

import dataclasses
import socket
import time
import urllib.request

import pytest
import yaml

from deployment import SCENARIO, carry_on, nodes, serve
from federations import lines, sha
from tcp_proxy import Proxy
from trellis import experiment, flower, scenario
from trellis.deploy.metrics import ServerMetrics
from trellis.deploy.node_metrics import NodeMetrics
from trellis.grids.grpc import Settings
from trellis.runs import Run
from trellis.wire.nodes import digest
from trellis_clients.link.consent import Consent

FOUR = range(4)
QUICK = Settings(beat_s=0.3, leave_after_s=0.5, give_up_after_s=60)


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
            there = [fleet.start(made[0].port if client == 1 else port, client, changed=consent) for client in FOUR]
            while any(node.connection.joined is None for node in there):  # the first round would start with three
                time.sleep(0.01)

        def cut(_, line):
            if line["round"] == 1:
                made[0].cut()

        hooks = experiment.Hooks(on_round=cut)
        settings = dataclasses.replace(QUICK, leave_after_s=2.0)  # a stream may take its time to open
        run, outcome = serve(tmp_path, listening, text, quorum, hooks, settings, min_clients=3)
    assert outcome.summaries[0]["sha256"] == expected != whole
    assert [row["replies"] for row in lines(run)[1:]] == [4, 3, 3]


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
