"""Prometheus metrics of the link, on both sides. Off unless given an address."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, start_http_server

from trellis.errors import TrellisError


class Metrics:
    """Counters of what happens on the link, by the names that it calls ``count`` with."""

    EVENTS: Mapping[str, tuple[str, tuple[str, ...]]] = {}

    def __init__(self, address: str | None) -> None:
        self.registry = CollectorRegistry()
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
    """What the server counts."""

    EVENTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
        "join": ("sessions opened", ("node",)),
        "shut-out": ("nodes shut out, or gone for good", ("node",)),
        "refused": ("calls and answers refused before a strategy saw them", ("reason",)),
        "sent": ("payload bytes sent", ("node",)),
        "received": ("payload bytes received", ("node",)),
    }


class NodeMetrics(Metrics):
    """What a node that trains counts."""

    EVENTS: Mapping[str, tuple[str, tuple[str, ...]]] = {"task": ("tasks answered", ("kind", "verdict"))}
