"""Clocks that jump: deadlines and pauses go by the monotonic clock."""

from __future__ import annotations

import ast
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from flwr.app import Message, RecordDict

from trellis import flower, records
from trellis.grids.grpc import GrpcGrid, Settings
from trellis.wire import certificates
from trellis_clients.link.connection import Connection, Identity

ROOT = Path(__file__).resolve().parents[2]
QUICK = Settings(beat_s=0.3, leave_after_s=0.5, give_up_after_s=60)


def message(client=0):
    content = RecordDict({"arrays": records.array_record({"w": np.zeros(3, np.float32)})})
    return Message(content, flower.node_of(client), "train")


@pytest.mark.battery("F7")
@pytest.mark.parametrize("jump", [600, -600])
def test_a_clock_that_jumps_by_ten_minutes_moves_no_deadline(monkeypatch, jump):
    """The wall clock is set by ten minutes, either way, in mid-round: the round closes at its deadline."""
    with GrpcGrid(1, QUICK, min_clients=1) as grid:
        identity = Identity(f"127.0.0.1:{grid.link.port}", "n", "i", client=0)
        idle = Connection(identity)
        idle.start()
        list(grid.get_node_ids())
        real, started = time.time, time.monotonic()
        threading.Timer(0.3, lambda: monkeypatch.setattr(time, "time", lambda: real() + jump)).start()
        (reply,) = grid.stream([message()], timeout=1.6)
        took = time.monotonic() - started
        assert abs(time.time() - real() - jump) < 1
        idle.close()
    assert reply.error.reason == "no reply before the deadline of 1.6 s"
    assert 1.5 <= took < 3.0


@pytest.mark.battery("F7")
def test_nothing_on_the_link_waits_by_the_wall_clock(tmp_path):
    """Only logs, metrics, the last day of credentials and certificates read it; they suit a clock ten minutes late."""
    reads = set()
    folders = [
        "platform/trellis/grids",
        "platform/trellis/wire",
        "platform/trellis/deploy",
        "clients/trellis_clients/link",
    ]
    for path in (path for folder in folders for path in (ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "time.time",
                "datetime.now",
                "datetime.utcnow",
            ):
                reads.add(path.name)
    assert reads <= {"nodes.py", "allowing.py", "certificates.py", "logs.py", "metrics.py", "node_metrics.py"}
    certificates.write(tmp_path, ["localhost"])
    for name in ("ca", "server"):
        made = x509.load_pem_x509_certificate((tmp_path / f"{name}.pem").read_bytes())
        assert made.not_valid_before_utc < datetime.now(UTC) - timedelta(minutes=10)
