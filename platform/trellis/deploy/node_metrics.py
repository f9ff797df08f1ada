"""Prometheus metrics of a node. Off unless given an address; a device shows them with its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import Gauge, Histogram
from prometheus_client.core import Metric

from trellis.deploy.metrics import Metrics

TASK_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


class NodeMetrics(Metrics):
    """What a node counts, and what it is at.

    Args:
        address: host and port to listen on; None for none.

    Raises:
        TrellisError: the address is none, or is taken.
    """

    EVENTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
        "task": ("tasks answered", ("kind", "verdict")),
        "node-reconnect": ("times that it joined again", ()),
        "node-received-bytes": ("payload bytes fetched", ()),
        "node-sent-bytes": ("payload bytes handed in", ()),
    }
    GAUGES: Mapping[str, tuple[str, str]] = {
        "connected": ("trellis_node_connected", "1 while it is joined"),
        "store": ("trellis_node_store_bytes", "what it keeps on its disk for the cell of its latest task"),
    }
    NAMES: Mapping[str, str] = {
        "reconnect": "node-reconnect",
        "received": "node-received-bytes",
        "sent": "node-sent-bytes",
    }

    def __init__(self, address: str | None) -> None:
        super().__init__(address)
        self._gauges = {event: Gauge(name, said, registry=self.registry) for event, (name, said) in self.GAUGES.items()}
        self._seconds = Histogram(
            "trellis_task_seconds", "from a task's arrival in turn to its verdict", ["kind"], buckets=TASK_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._last = Gauge(
            "trellis_node_last_task_time_seconds", "when the last task was answered, Unix time", registry=self.registry
        )

    def count(self, event: str, labels: Mapping[str, str]) -> None:
        """Count an event. ``bytes`` is how much, ``value`` what something is now, ``seconds`` how long a task took."""
        if event in self._gauges:
            self._gauges[event].set(float(labels["value"]))
            return
        if event == "task":
            self._last.set_to_current_time()
            if "seconds" in labels:
                self._seconds.labels(labels["kind"]).observe(float(labels["seconds"]))
        named = {key: value for key, value in labels.items() if key not in ("seconds", "bytes")}
        counter = self._counters[self.NAMES.get(event, event)]
        (counter.labels(**named) if named else counter).inc(float(labels.get("bytes", 1)))

    def collect(self) -> Iterable[Metric]:
        """Yield what is this node's alone, for a registry that has the process's figures itself."""
        return (metric for metric in self.registry.collect() if metric.name.startswith("trellis_"))
