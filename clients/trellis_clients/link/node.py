"""``trellis join``: the process of a node that trains."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from trellis import scenario
from trellis.deploy.joining import NodeConfig, Where
from trellis.deploy.metrics import NodeMetrics
from trellis.deploy.serving import ENCODINGS
from trellis.errors import TrellisError
from trellis.scenario import Scenario
from trellis_clients.link.connection import Identity
from trellis_clients.link.consent import Consent
from trellis_clients.link.store import instance_of
from trellis_clients.link.training import TrainingNode

log = logging.getLogger("trellis.node")


def run(
    where: Where,
    *,
    node: str = "",
    config: NodeConfig | None = None,
    state: Path = Path("node"),
    compression: str = "none",
    allowed: Sequence[str] = (),
    code: Path | None = None,
    give_up_after_s: float | None = None,
    metrics_address: str | None = None,
    grace_s: float = 30.0,
) -> str:
    """Be a node until the run is over or SIGTERM, and return the server's last word.

    Args:
        where: the server and the node's credentials.
        node: its name; where credentials say it, it may be empty.
        config: which client it wants to be, and what is its own.
        state: folder of its store.
        compression: of answers, ``none`` or ``zstd``.
        allowed, code: see ``trellis_clients.link.consent``.
        give_up_after_s: without the server for this long it ends.
        metrics_address: of Prometheus metrics.
        grace_s: on SIGTERM a task under way has this long to finish.

    Raises:
        TrellisError: options do not fit, or the server does not want this node.
    """
    config = config or NodeConfig()
    if compression not in ENCODINGS:
        raise TrellisError("usage", f"--compression is {compression!r}; there are {', '.join(ENCODINGS)}")
    named = node or ("" if where.token or where.certificate else f"{socket.gethostname()}-{os.getpid()}")
    instance = instance_of(state)
    identity = Identity(
        where.address,
        named,
        instance,
        client=config.client,
        token=where.token,
        channel_credentials=where.credentials(),
        give_up_after_s=give_up_after_s,
    )

    consent = Consent(allowed, code)

    def changed(given: Scenario) -> Scenario:
        raw = scenario.plain(given)
        for override in config.overrides:
            raw = scenario.with_override(raw, override)
        return scenario.validated(Scenario, raw)

    worker = TrainingNode(
        identity,
        state,
        changed=lambda given: changed(consent(given)),
        encoding=ENCODINGS[compression],
        counted=NodeMetrics(metrics_address).count,
    )
    stopping = _stop_gently(worker, grace_s)
    reason = worker.run()
    stopping.set()
    return reason


def _stop_gently(worker: TrainingNode, grace_s: float) -> threading.Event:
    """On SIGTERM and SIGINT let the task under way finish and be handed in, within a time, and then leave."""
    over = threading.Event()
    told = threading.Event()

    def leave() -> None:
        worker.finish()
        if not over.wait(grace_s):
            give_up(f"not done after {grace_s:g} s")

    def give_up(reason: str) -> None:
        log.warning("stopped in the middle of a task", extra={"reason": reason})
        worker.connection.close("it stops in the middle of a task")
        os._exit(1)

    def asked(_: int, __: FrameType | None) -> None:
        target, arguments = (give_up, ("asked twice",)) if told.is_set() else (leave, ())
        told.set()
        threading.Thread(target=target, args=arguments, name="trellis-node-stop", daemon=True).start()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, asked)
    return over
