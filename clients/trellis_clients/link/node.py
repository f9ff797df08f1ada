"""``trellis join``: the process of a node that trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trellis import scenario
from trellis.deploy.joining import NodeConfig, Where
from trellis.deploy.node_metrics import NodeMetrics
from trellis.deploy.serving import ENCODINGS
from trellis.deploy.stopping import Stopping
from trellis.errors import TrellisError
from trellis.scenario import Scenario
from trellis_clients.link.connection import Identity
from trellis_clients.link.consent import Consent
from trellis_clients.link.store import held, instance_of, name_of
from trellis_clients.link.training import TrainingNode


def run(
    where: Where,
    stopping: Stopping,
    *,
    node: str = "",
    config: NodeConfig | None = None,
    state: Path = Path("node"),
    compression: str = "none",
    allowed: Sequence[str] = (),
    code: Path | None = None,
    give_up_after_s: float | None = None,
    metrics_address: str | None = None,
) -> str:
    """Be a node until the run is over or SIGTERM, and return the server's last word, "" after SIGTERM.

    Args:
        where: the server and the node's credentials.
        stopping: takes SIGTERM. A task under way has time to finish; one that does not is handed back.
        node: its name; where credentials say it, it may be empty.
        config: which client it wants to be, and what is its own.
        state: folder of its store.
        compression: of answers, ``none`` or ``zstd``.
        allowed, code: see ``trellis_clients.link.consent``.
        give_up_after_s: without the server for this long it ends.
        metrics_address: of Prometheus metrics.

    Raises:
        TrellisError: options do not fit, or the server does not want this node.
    """
    config = config or NodeConfig()
    if compression not in ENCODINGS:
        raise TrellisError("usage", f"--compression is {compression!r}; there are {', '.join(ENCODINGS)}")
    instance = instance_of(state)
    identity = Identity(
        where.address,
        node or ("" if where.token or where.certificate else name_of(instance)),
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

    def leave() -> int:
        worker.log.warning("stopped in the middle of a task")
        worker.connection.close("it stops in the middle of a task")
        return stopping.status  # nothing is lost: the server keeps the task open and asks it again

    with held(state), stopping.during(worker.finish, leave):
        return worker.run()
