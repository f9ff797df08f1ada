"""What a device tells Prometheus, in a registry of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from wsgiref.simple_server import WSGIServer

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    start_http_server,
)

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
NATS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0)


class Metrics:
    """Counters and gauges of one server. All labels come from sets that the code bounds, none from a request."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "trellis_edge_requests", "Requests that reached a handler, by method and gRPC status",
            ["method", "code"], registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "trellis_edge_request_seconds", "From the handler's start to its answer, waiting included",
            ["method"], buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.waiting = Gauge("trellis_edge_queue", "Batches that wait or are being answered", registry=registry)
        self.examples = Counter("trellis_edge_examples", "Examples answered", registry=registry)
        self.entropy = Histogram(
            "trellis_edge_entropy_nats", "Entropy of the prediction of each example", buckets=NATS, registry=registry
        )
        self.uploads = Counter(
            "trellis_edge_uploads", "Samples by what became of them: selected, dropped for want of room, sent",
            ["outcome"], registry=registry,
        )  # fmt: skip
        self.upload_items = Gauge(
            "trellis_edge_upload_buffer_items", "Samples that wait for the cloud", registry=registry
        )
        self.upload_bytes = Gauge("trellis_edge_upload_buffer_bytes", "Bytes of their images", registry=registry)
        self.adaptation = Gauge(
            "trellis_edge_adaptation", "State of selection and adapter: numbers as they are, arrays by their elements",
            ["key"], registry=registry,
        )  # fmt: skip
        self.model = Info("trellis_edge_model", "The model that is served", registry=registry)
        self.swaps = Counter(
            "trellis_edge_swaps", "New models and affine parameters, by whether they were taken in",
            ["what", "outcome"], registry=registry,
        )  # fmt: skip

    def predicted(self, entropies: NDArray[np.float32]) -> None:
        """Count a batch's examples and their entropies."""
        self.examples.inc(len(entropies))
        for value in entropies.tolist():
            self.entropy.observe(value)

    def adapted(self, state: Iterable[tuple[str, float]]) -> None:
        """Show what adaptation has come to."""
        for key, value in state:
            self.adaptation.labels(key).set(value)


def serve(metrics: Metrics, host: str, port: int) -> tuple[WSGIServer, threading.Thread]:
    """Answer scrapes over HTTP at ``/metrics``; port 0 takes a free one. Return the server and its thread."""
    return start_http_server(port, host, metrics.registry)
