"""Time to merge prototypes: 100 clients report 10,000 classes of 512 dimensions each.

    python benchmarks/prototype_merge.py

Compared with the least that could be done: a running mean in float64, block by block, which gives other bits in
another order of clients and counts resent reports twice. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np

from trellis_server.prototypes import ROWS, Evidence, PrototypeStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prototype_merge.json")
    sizes = parser.parse_args()
    generator = np.random.default_rng(0)
    labels = np.arange(sizes.classes)
    # Ten different reports in turn: a hundred would be 2 GB that nobody reads twice.
    reports = [
        Evidence(
            labels,
            generator.integers(1, 100, sizes.classes),
            generator.normal(size=(sizes.classes, sizes.width)).astype(np.float32),
            1,
        )
        for _ in range(min(10, sizes.clients))
    ]
    store, merge, resend, bare = PrototypeStore(sizes.classes, sizes.width), [], [], []
    for client in range(sizes.clients):
        report = reports[client % len(reports)]
        start = time.perf_counter()
        store.add(client, report)
        merge.append(time.perf_counter() - start)
    start = time.perf_counter()
    means = store.means()
    reading = time.perf_counter() - start
    for client in range(10):
        start = time.perf_counter()
        assert not len(store.add(client, reports[client % len(reports)]))
        resend.append(time.perf_counter() - start)
    counts, running = np.zeros(sizes.classes), np.zeros((sizes.classes, sizes.width))
    for client in range(sizes.clients):
        report = reports[client % len(reports)]
        start = time.perf_counter()
        counts += report.counts
        share = (report.counts / counts)[:, None]
        for row in range(0, sizes.classes, ROWS):
            part = running[row : row + ROWS]
            part += share[row : row + ROWS] * (report.means[row : row + ROWS] - part)
        bare.append(time.perf_counter() - start)
    result = {
        "classes": sizes.classes,
        "width": sizes.width,
        "clients": sizes.clients,
        "merge_all_s": round(sum(merge), 2),
        "merge_one_median_s": round(median(merge), 4),
        "read_means_s": round(reading, 3),
        "resend_one_median_s": round(median(resend), 4),
        "running_mean_all_s": round(sum(bare), 2),
        "ratio_to_running_mean": round(sum(merge) / sum(bare), 2),
        "store_mb": round(sum(a.nbytes for a in store.state_dict().values()) / 1e6, 1),
        "largest_difference_from_running_mean": float(np.abs(means - running).max()),
    }
    for name, value in result.items():
        print(f"{name:40} {value:>12}")
    sizes.out.parent.mkdir(parents=True, exist_ok=True)
    sizes.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
