"""How long a step of SAM, ESAM, SAF and MESA takes, over one of plain SGD on the same model and batches.

In turn, a few steps of every trainer, so that what else the machine does meets all of them alike; each ratio is of one
such round, and the figure their median with quartiles. A step is everything between two batches: loss, backward,
update. The trajectory losses are active and SAF's memory is full. One thread; CPU time is judged, wall time stands
beside it. What the papers say (ESAM 1.4, SAF about 1, MESA 1 / 0.85) is of large networks on GPUs; a step here also
costs Python and torch's dispatch, which weigh the more the smaller the network.

    python benchmarks/sharpness_step_time.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import Row, row

from trellis import flower, scenario, seeding
from trellis.experiment import torch_threads
from trellis.runs import environment
from trellis_clients.site import Cell, Site
from trellis_clients.trainer import Turn

ROOT = Path(__file__).resolve().parents[1]

MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"model": {"name": "mlp", "hidden": [64, 32]}, "data": "digits"},
    "small-cnn": {"model": {"name": "small-cnn"}, "data": "digits"},
    "resnet-8": {"model": {"name": "resnet", "depth": 8}, "data": {"name": "digits", "size": 32, "channels": 3}},
}
TRAINERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "sam": {},
    "esam": {},
    "saf": {"start_epoch": 0, "lookback": 1},
    "mesa-saf": {"start_epoch": 0},
}
CLAIMED = {"sam": 2.0, "esam": 1.4, "saf": 1.01, "mesa-saf": 1.18}
"""Over SGD. ESAM's is of its abstract; SAF's and MESA's are 1 / 0.99 and 1 / 0.85, the speeds of their table."""
EXAMPLES = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few samples: shows that it runs, not for figures")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sharpness_step_time.json")
    arguments = parser.parse_args()
    flower.quiet()
    rows = [each for name in MODELS for each in measure(name, 5 if arguments.quick else 60)]
    result = {"environment": environment(), "rows": [dataclasses.asdict(each) for each in rows]}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(name: str, repeats: int, batch_size: int = 64) -> list[Row]:
    """Return the rows of one model: each trainer's CPU time over SGD's (``cpu``), and the same of wall time."""
    with torch_threads(1):
        running = {trainer: steps(site(name, trainer, batch_size)) for trainer in TRAINERS}
        for each in running.values():
            advance(each, 4 * EXAMPLES // batch_size)  # SAF's memory fills; first executions find cold pages
        count = 2 if name.startswith("resnet") else 10
        samples = [{trainer: advance(each, count) for trainer, each in running.items()} for _ in range(repeats)]
    plain = median(sample["sgd"][1] for sample in samples) / count
    rows = []
    for trainer in list(TRAINERS)[1:]:
        wall, cpu = ([s[trainer][kind] / s["sgd"][kind] for s in samples] for kind in (0, 1))
        note = f"a step of SGD takes {1000 * plain:.2f} ms of CPU time"
        title = f"a step of {trainer} over one of SGD, {name}, {batch_size} images"
        rows.append(row(f"{name}-{trainer}", title, "", wall, cpu=median(cpu), target=CLAIMED[trainer], note=note))
        print(f"{title:55} {median(cpu):5.2f} CPU, {median(wall):5.2f} wall; claimed {CLAIMED[trainer]}", flush=True)
    return rows


def site(name: str, trainer: str, batch_size: int) -> Site:
    """Return one client with a model of its own."""
    settings = {"name": trainer, "batch_size": batch_size, "lr": 0.01, "momentum": 0.9, "local_epochs": 10**6}
    raw = {
        "name": "step-time",
        "clients": 10,
        **MODELS[name],
        "trainer": {**settings, **TRAINERS[trainer]},
        "runtime": {"grid": "local"},
    }
    return Site(Cell(scenario.plain(scenario.from_mapping(raw)), 0))


def steps(site: Site) -> Iterator[None]:
    """Take one step of training after the other, without end."""
    turn = Turn(1, 1, 0, 10, seeding.torch_generator(0), received={})
    trainer, model = site.trainer, site.model
    split = site.federation.client(0).train
    split = split.subset(torch.arange(EXAMPLES) % len(split))  # whole batches only
    optimizer = trainer.optimizer(model, turn)
    model.train()
    for batch in trainer.batches(split, turn):
        optimizer.zero_grad(set_to_none=True)
        trainer.loss(model, batch, turn).backward()  # type: ignore[no-untyped-call]
        trainer.adjust_gradients(model, {}, turn)
        optimizer.step()
        yield


def advance(running: Iterator[None], count: int) -> tuple[float, float]:
    """Take some steps; return their wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(running)
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
