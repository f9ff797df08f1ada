"""Peak memory of a run with a large model, against what its parts must hold.

    bound = workers x (model + gradients + optimiser state + batch) + 2 x model

Every run has a process of its own. Memory is what belongs to the process alone (RssAnon), read every few
milliseconds, above what it was after the imports and a run of a tiny model. On Ray it is that of the driver and all
workers and the pages of the object store, which are counted once: the highest sum at one time.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import Row, in_new_process, row, run_rounds

EVERY_S = 0.004
INPUTS, HIDDEN, CLIENTS, BATCH = 1024, (4096, 3840), 10, 32

LARGE = """\
name: large
data: {{name: gaussians, examples: {examples}, test_examples: 10, shape: [{inputs}], classes: 10}}
clients: {clients}
partition: {{name: iid, test_fraction: 0.0}}
model: {{name: mlp, hidden: [{hidden}]}}
trainer: {{name: sgd, lr: 0.01, momentum: 0.9, batch_size: {batch}}}
rounds: {{count: {rounds}}}
evaluation: {{central_every: 0, federated_every: 0}}
probe: {{every: 0}}
"""

GATES = {"gate": "", "no-direction": "screening: {min_cosine: null}\n", "no-gate": "screening: {enabled: false}\n"}


def rows(quick: bool) -> Iterator[Row]:
    """One process and two Ray workers, with the gate as it is by default, without its direction check, and off."""
    repeats, gates = (1, ("no-gate",)) if quick else (2, tuple(GATES))
    for grid, workers in (("local", 1), ("ray", 2)):
        for gate in gates:
            found = [in_new_process("memory", grid, workers, gate) for _ in range(repeats)]
            model = found[0]["model_mb"]
            bound = workers * (3 * model + found[0]["batch_mb"]) + 2 * model
            where = "in one process" if grid == "local" else f"on {workers} Ray workers"
            parts = ", ".join(f"{name} {found[0][name]:.0f}" for name in ("driver_mb", "workers_mb", "store_mb"))
            parts = parts if grid == "ray" else "all of it the process's own"
            yield row(
                f"memory-{grid}-{gate}",
                f"peak memory {where}, {gate.replace('-', ' ')}",
                "MB",
                [each["peak_mb"] for each in found],
                target=bound,
                note=f"model {model:.0f} MB; {parts}",
            )


class Peaks:
    """Watches the memory of this process and of the Ray workers that it started.

    ``RssAnon`` is a process's own; ``RssShmem`` of this one are the pages of Ray's object store that it wrote or
    read, which are all that a run puts there: the global arrays are written here, the replies are read here.

    Attributes:
        peak: bytes at the time when their sum was highest, by what they belong to: the driver (above what it had
            when watching began), the workers, the store (likewise).
    """

    def __init__(self) -> None:
        self.peak = {"driver": 0, "workers": 0, "store": 0}
        self._workers: list[int] = []
        self._end = threading.Event()
        self._first = _memory_of(os.getpid())
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        turns = 0
        while not self._end.wait(EVERY_S):
            if turns % 50 == 0:
                self._workers = list(_ray_workers())
            turns += 1
            own = _memory_of(os.getpid())
            now = {
                "driver": own["RssAnon"] - self._first["RssAnon"],
                "workers": sum(_memory_of(worker).get("RssAnon", 0) for worker in self._workers),
                "store": own["RssShmem"] - self._first["RssShmem"],
            }
            if sum(now.values()) > sum(self.peak.values()):
                self.peak = now


def _memory_of(process: int) -> dict[str, int]:
    """Return the kinds of a process's resident memory in bytes; nothing of one that is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    found = (line.partition(":") for line in lines if line.startswith("Rss"))
    return {kind: int(text.split()[0]) * 1024 for kind, _, text in found}


def _ray_workers() -> Iterator[int]:
    """Yield the process ids of the workers of the Ray that this process started."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline()[:1])
        except psutil.Error:
            continue
        if command.startswith("ray::Worker"):
            yield process.pid


def _one(grid: str, workers: int, gate: str) -> dict[str, Any]:
    """Run a few rounds in this process and say what was held at the peak."""
    import torch  # noqa: F401 (its pages belong to the empty process)

    if grid == "ray":
        from trellis.grids.ray import start_ray

        start_ray(num_cpus=workers, object_store_mb=1500)
    # The same imports and first executions, with a model of a few numbers.
    with Peaks() as empty:
        run_rounds(_scenario(4, (4,), grid, workers, gate, rounds=8), warm=0)
    with Peaks() as peaks:
        run_rounds(_scenario(INPUTS, HIDDEN, grid, workers, gate, rounds=3), warm=0)
    sizes = (INPUTS, *HIDDEN, 10)
    return {
        "model_mb": 4 * sum(a * b + b for a, b in itertools.pairwise(sizes)) / 2**20,
        "batch_mb": 4 * BATCH * sum(sizes) / 2**20,
        "peak_mb": (sum(peaks.peak.values()) - empty.peak["workers"]) / 2**20,
        "driver_mb": peaks.peak["driver"] / 2**20,
        "workers_mb": (peaks.peak["workers"] - empty.peak["workers"]) / 2**20,
        "store_mb": peaks.peak["store"] / 2**20,
    }


def _scenario(inputs: int, hidden: tuple[int, ...], grid: str, workers: int, gate: str, rounds: int) -> str:
    text = LARGE.format(
        inputs=inputs,
        hidden=", ".join(map(str, hidden)),
        clients=CLIENTS,
        batch=BATCH,
        examples=CLIENTS * BATCH * 2,
        rounds=rounds,
    )
    return text + GATES[gate] + f"runtime: {{grid: {grid}" + (f", workers: {workers}}}\n" if grid == "ray" else "}\n")


if __name__ == "__main__":
    print(json.dumps(_one(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
