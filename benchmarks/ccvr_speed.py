"""How long calibrating a large head takes in the cloud: 100 classes of 512 features, answers of 100 clients.

Every client reports every class, which is the most there can be. Prints and writes the seconds of each step: reading
and checking the answers, pooling them, drawing virtual features, training the head. One core, float32 uploads. CPU
seconds stand beside them, for machines that do other things too.

    python benchmarks/ccvr_speed.py [--classes 100] [--features 512] [--clients 100] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord

from trellis import records, seeding
from trellis.experiment import torch_threads
from trellis.runs import environment
from trellis_server import moments
from trellis_server.head import Training, retrain

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = 600
"""Examples of a class at a client: more than features, so that covariances have full rank and checks cost the most."""
VIRTUAL = 100
EPOCHS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ccvr_speed.json")
    arguments = parser.parse_args()
    layout = moments.Layout(arguments.classes, arguments.features)
    answers = some_answers(layout)
    wall: dict[str, float] = defaultdict(float)
    cpu: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        wall[step] += time.perf_counter() - start
        cpu[step] += time.process_time() - cpu_start

    with torch_threads(1):
        pool = moments.Pool(layout.features)
        for client in range(arguments.clients):
            with timed("check"):
                answer = moments.read(answers[client % len(answers)], layout)
            with timed("pool"):
                pool.add(answer)
        with timed("virtual features"):
            drawn = moments.amounts(pool, VIRTUAL, pool.classes, proportional=False)
            features, labels = moments.virtual_features(pool, drawn, seeding.numpy_generator(0))
        head = [torch.zeros(layout.classes, layout.features), torch.zeros(layout.classes)]
        with timed("train the head"):
            training = Training(EPOCHS, lr=0.01, momentum=0.9, batch_size=64)
            retrain(head, features, labels, training, seeding.torch_generator(0))
    answer_bytes = sum(records.num_bytes(array) for array in answers[0].values())
    result: dict[str, Any] = {
        "classes": layout.classes,
        "features": layout.features,
        "clients": arguments.clients,
        "virtual_per_class": VIRTUAL,
        "epochs": EPOCHS,
        "answer_mb": answer_bytes / 1e6,
        "seconds": {**wall, "all": sum(wall.values())},
        "cpu_seconds": {**cpu, "all": sum(cpu.values())},
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "environment": environment(),
    }
    for step, value in result["seconds"].items():
        print(f"{step:18} {value:8.2f} s, CPU {result['cpu_seconds'][step]:8.2f} s")
    print(f"one answer {result['answer_mb']:.1f} MB; peak memory of the process {result['peak_rss_mb']:.0f} MB")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def some_answers(layout: moments.Layout, count: int = 2) -> list[ArrayRecord]:
    """Return a few different answers, which the clients take turns to give."""
    answers = []
    rows = np.triu_indices(layout.features)
    for client in range(count):
        generator = np.random.default_rng(client)
        size, classes = layout.features, layout.classes
        basis = generator.standard_normal((EXAMPLES, size)).astype(np.float32)
        covariance = basis.T @ basis / EXAMPLES
        triangles = covariance[rows] * generator.uniform(0.5, 2, (classes, 1)).astype(np.float32)
        answers.append(
            records.array_record(
                {
                    "labels": np.arange(classes),
                    "counts": np.full(classes, EXAMPLES),
                    "means": generator.standard_normal((classes, size)).astype(np.float32),
                    "triangles": triangles.astype(np.float32),
                }
            )
        )
    return answers


if __name__ == "__main__":
    main()
