"""The framework's own overhead, measured inside the run by replaying a round as bare training steps.

R = time of a round's training part (sample, send, train, screen, fold, aggregate) over the time of the same
clients' forward, backward and update alone, on the same workers with the same batches and weights. The
replay changes nothing: it draws from its own generators and its result is thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from flwr.app import Message

from trellis.grids.base import ClientGrid
from trellis.scenario import Probe as Settings

COUNTED = ("sample", "train", "aggregate")


def probe_rounds(settings: Settings, count: int) -> set[int]:
    """Return the rounds to replay: every k-th, and at least ``least`` of them spread evenly after round 1."""
    if not settings.every or count < 1:
        return set()
    rounds = set(range(settings.every, count + 1, settings.every))
    if len(rounds) < settings.least:
        first = min(2, count)
        step = max((count - first) / max(settings.least - 1, 1), 0)
        rounds |= {round(first + step * i) for i in range(settings.least)}
    return {number for number in rounds if number <= count}


class Probe:
    """Replays one round on the grid's own workers."""

    def __init__(self, grid: ClientGrid, timeout: float) -> None:
        self.grid = grid
        self.timeout = timeout

    def measure(
        self, messages: Sequence[Message], wall: Mapping[str, float], cpu: Mapping[str, float], clients_cpu: float
    ) -> dict[str, Any] | None:
        """Return the round's time over the bare time; None if a client could not be replayed.

        Args:
            messages: what was sent to the clients in the round's training part.
            wall: wall seconds of the round's phases.
            cpu: CPU seconds of this process in the same phases.
            clients_cpu: CPU seconds that the clients say their turns took.
        """
        queries = [Message(message.content, message.metadata.dst_node_id, "query.bare") for message in messages]
        bare_wall = bare_cpu = 0.0
        for reply in self.grid.stream(queries, timeout=self.timeout):
            if reply.has_error():
                return None
            metrics: Any = reply.content["metrics"]
            bare_wall += metrics["bare_s"]
            bare_cpu += metrics["bare_cpu_s"]
        round_s = sum(wall.get(name, 0.0) for name in COUNTED)
        round_cpu = sum(cpu.get(name, 0.0) for name in COUNTED)
        # Side by side, as many at once as there are workers; no framework could be faster than that.
        bare_s = bare_wall / min(self.grid.workers, max(len(queries), 1))
        if bare_s <= 0 or bare_cpu <= 0:
            return None
        if not self.grid.in_process:
            round_cpu += clients_cpu
        return {
            "round_s": round_s,
            "bare_s": bare_s,
            "ratio": round_s / bare_s,
            "cpu_ratio": round_cpu / bare_cpu,
        }


def summarise(probes: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the median ratio of a run with its quartiles; None if nothing was measured."""
    ratios = [probe["ratio"] for probe in probes]
    if not ratios:
        return None
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
    return {
        "ratio": median(ratios),
        "low": low,
        "high": high,
        "cpu_ratio": median(probe["cpu_ratio"] for probe in probes),
        "samples": len(ratios),
    }
