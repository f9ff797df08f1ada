"""A server and nodes on real loopback sockets: nodes in threads where that is enough, else as processes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from federations import write
from trellis import experiment, flower, scenario
from trellis.deploy import serving
from trellis.grids.grpc import Settings
from trellis.runs import Run
from trellis_clients.link.connection import Identity
from trellis_clients.link.store import instance_of
from trellis_clients.link.training import TrainingNode

TRELLIS = [sys.executable, "-c", "from trellis.cli import main; main()"]

SCENARIO = """\
name: deployed
data: digits
clients: 4
partition: {name: dirichlet, alpha: 0.5}
model: {name: mlp, hidden: [16]}
trainer: {name: scaffold, lr: 0.1}
strategy: scaffold
rounds: {count: 3}
runtime: {grid: local}
"""
"""SCAFFOLD: clients keep a private state, and payloads go both ways beside the weights."""


class Nodes:
    """Nodes as threads of this process. A model of each is live at once, as on machines of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, tuple[TrainingNode, threading.Thread]] = {}
        self.ends: dict[str, Any] = {}
        self.port = 0

    def start_all(self, port: int) -> None:
        """Start the four that ``SCENARIO`` asks for, once the server listens."""
        self.port = port
        for client in range(4):
            self.start(port, client)

    def start(self, port: int, client: int | None, name: str | None = None, **identity: Any) -> TrainingNode:
        name = name or f"node-{client}"
        state = self.folder / name
        options = {key: identity.pop(key) for key in ("changed", "encoding", "counted") if key in identity}
        called = identity.pop("node", name)
        address = identity.pop("address", f"127.0.0.1:{port}")
        who = Identity(address, called, instance_of(state), client=client, **identity)
        node = TrainingNode(who, state, **options)

        def run() -> None:
            try:
                self.ends[name] = node.run()
            except BaseException as error:
                self.ends[name] = error

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        self.running[name] = node, thread
        return node

    def stop(self) -> None:
        for node, thread in self.running.values():
            node.finish()
            node.connection.close()
            thread.join(120)


@contextmanager
def nodes(folder: Path) -> Iterator[Nodes]:
    held = Nodes(folder)
    try:
        yield held
    finally:
        held.stop()


def serve(
    folder: Path,
    on_listening: Any,
    text: str = SCENARIO,
    overrides: tuple[str, ...] = (),
    hooks: Any = None,
    settings: Settings | None = None,
    **options: Any,
) -> tuple[Run, experiment.Outcome]:
    """Run a scenario on nodes; ``on_listening(port)`` starts them. Returns the run and its outcome."""
    flower.quiet()
    run = Run.create(folder / "runs", scenario.load(write(folder, text), overrides))
    return run, carry_on(run, on_listening, hooks, settings, **options)


def carry_on(
    run: Run, on_listening: Any, hooks: Any = None, settings: Settings | None = None, **options: Any
) -> experiment.Outcome:
    counted = options.pop("counted", lambda *_: None)
    chosen = serving.Options(settings or Settings(beat_s=0.5, leave_after_s=20, give_up_after_s=60), **options)
    return experiment.execute(run, hooks, serving.grids(chosen, run.path.name, on_listening, counted))


def process(*arguments: str, inside: str | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start ``trellis …`` as a process of its own, in a network namespace if one is named."""
    there = ["ip", "netns", "exec", inside] if inside else []
    return subprocess.Popen(
        [*there, *TRELLIS, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
