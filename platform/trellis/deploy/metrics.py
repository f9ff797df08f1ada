"""Prometheus metrics of the link, on both sides. Off unless given an address."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric

from trellis.errors import TrellisError

if TYPE_CHECKING:
    from trellis.grids.grpc import Link

ROUND_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
CODE = re.compile(r"^([a-z][a-z-]*): ")
"""How the reason of an answer that was not admitted begins: with its code (docs/errors.md)."""


class Metrics:
    """Counters of what happens on the link, by the names that it calls ``count`` with."""

    EVENTS: Mapping[str, tuple[str, tuple[str, ...]]] = {}

    def __init__(self, address: str | None) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._counters = {
            event: Counter(f"trellis_{event.replace('-', '_')}", said, labels, registry=self.registry)
            for event, (said, labels) in self.EVENTS.items()
        }
        if address is not None:
            host, _, port = address.rpartition(":")
            if not port.isdigit():
                raise TrellisError("usage", f"--metrics-address is host:port, not {address!r}")
            try:
                start_http_server(int(port), addr=host or "127.0.0.1", registry=self.registry)
            except OSError as error:
                raise TrellisError("metrics-address", f"{address}: {error.strerror}") from None

    def count(self, event: str, labels: Mapping[str, str]) -> None:
        """Count an event; ``bytes`` among its labels is how much, not a label."""
        named = {key: value for key, value in labels.items() if key != "bytes"}
        self._counters[event].labels(**named).inc(float(labels.get("bytes", 1)))


class ServerMetrics(Metrics):
    """What the server counts, what it sees of its link when it is asked, and how rounds go."""

    EVENTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
        "join": ("sessions opened", ("node",)),
        "shut-out": ("nodes shut out, or gone for good", ("node",)),
        "refused": ("calls and answers refused on the link; no node where nobody knows who called", ("node", "reason")),
        "answer": ("answers by what became of them: accepted, failed, refused", ("node", "outcome")),
        "sent": ("payload bytes sent", ("node",)),
        "received": ("payload bytes received", ("node",)),
        "lost": (
            "updates and evaluations that did not count, by the gate's code or 'failed'",
            ("node", "client", "code"),
        ),
    }

    def __init__(self, address: str | None) -> None:
        super().__init__(address)
        self._link: Link | None = None
        labels = ("cell",)
        self._round = Gauge("trellis_round", "latest complete round", labels, registry=self.registry)
        self._ended = Gauge("trellis_round_end_seconds", "when it ended, Unix time", labels, registry=self.registry)
        self._seconds = Histogram(
            "trellis_round_seconds", "how long rounds take", labels, buckets=ROUND_SECONDS, registry=self.registry
        )

    def watch(self, link: Link) -> None:
        """Show a link's figures as they are whenever somebody asks."""
        if self._link is None:
            self.registry.register(_Figures(lambda: self._link.figures() if self._link else {}))
        self._link = link

    def round(self, cell: str, line: Mapping[str, Any]) -> None:
        """Count a round, as it stands in ``metrics.jsonl``, and what did not count in it."""
        self._round.labels(cell).set(line["round"])
        self._ended.labels(cell).set(time.time())
        self._seconds.labels(cell).observe(line["seconds"])
        names = {node.client: node.name for node in list(self._link.nodes.values())} if self._link else {}
        for failure in line["failures"]:
            code = CODE.match(failure["reason"] or "")
            labels = {"node": names.get(failure["client"], ""), "client": str(failure["client"])}
            self.count("lost", {**labels, "code": code[1] if code else "failed"})


class _Figures:
    """Gauges that are read off the link when they are asked for."""

    SAID: Mapping[str, str] = {
        "clients": "clients of the federation",
        "connected": "nodes that are connected",
        "tasks": "tasks that wait for their answer",
        "answer_bytes": "bytes of answers that are on their way in, or not read yet",
        "payload_bytes": "bytes of payloads that open tasks refer to",
    }

    def __init__(self, figures: Callable[[], Mapping[str, int]]) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        for name, value in self._figures().items():
            yield GaugeMetricFamily(f"trellis_{name}", self.SAID[name], value=value)
