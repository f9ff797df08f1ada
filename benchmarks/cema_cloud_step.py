"""What one step of CEMA's cloud costs over the bare forward and backward passes of its two models.

The bare loop does the same arithmetic with nothing around it: the foundation model forward and backward on the uploads,
forward on uploads and replay, the edge model forward and backward on these, two SGD steps, plain batch norm. What the
step adds is batch renormalisation, the losses' weights, the replay buffer and the queue. One core.

    python benchmarks/cema_cloud_step.py [--repeats 40] [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from torch.nn import functional as F

from trellis import experiment, registry, seeding
from trellis.models import adaptation
from trellis.runs import environment
from trellis_clients.contract import site_of
from trellis_clients.site import Site
from trellis_server.cloud_adaptation import CloudAdaptation, Settings
from trellis_server.distillation import Weights

ROOT = Path(__file__).resolve().parents[1]
SCENARIO = ROOT / "scenarios" / "cloud" / "cema.yaml"
UPLOADS, REPLAYED = 16, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cema_cloud_step.json")
    arguments = parser.parse_args()
    site = site_of(SCENARIO)
    shape, classes = site.trainer.task.shape, site.trainer.task.num_classes
    settings = Settings(
        e_max=0.4 * math.log(classes),
        upload_batch=UPLOADS,
        replay_batch=REPLAYED,
        replay_size=500,
        replay_least=64,
        foundation_lr=1e-4,
        edge_lr=1e-4,
        momentum=0.9,
        weights=Weights(),
        temperature=1.0,
        distil=True,
        follow=True,
        max_grad_norm=None,
    )
    with experiment.torch_threads(1), seeding.scoped(0):
        foundation, edge = foundation_of(site), site.trainer.build()
        cloud = CloudAdaptation(lambda: copy.deepcopy(foundation), edge, settings, 0, torch.device("cpu"))
        cloud.adapt({0: torch.randn(500, *shape)})
        bare = Bare(copy.deepcopy(foundation), copy.deepcopy(edge))
        uploads, batch = torch.randn(UPLOADS, *shape), torch.randn(UPLOADS + REPLAYED, *shape)
        ours, theirs = [], []
        for _ in range(arguments.repeats):  # in turns, so that a busy machine hurts both
            ours.append(timed(lambda: cloud.adapt({0: uploads})))
            theirs.append(timed(lambda: bare.step(uploads, batch)))
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, _, high = quantiles(ratios, n=4)
    result = {
        "step_ms": 1e3 * median(ours),
        "bare_ms": 1e3 * median(theirs),
        "ratio": median(ratios),
        "quartiles": [low, high],
        "repeats": arguments.repeats,
        "environment": environment(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"cloud step {result['step_ms']:.2f} ms, bare {result['bare_ms']:.2f} ms: "
        f"{result['ratio']:.2f} times ({low:.2f} to {high:.2f})"
    )


def foundation_of(site: Site) -> torch.nn.Module:
    """Return the scenario's foundation model, untrained: its speed does not depend on its weights."""
    component = site.scenario.strategy.params["foundation"]
    options = dict(component)
    cls = registry.load("models", options.pop("name"))
    data = site.federation.data
    return cls(cls.Config(**options)).build(data.example_shape, data.num_classes, data.facts)


class Bare:
    """Two models and two optimisers, and nothing else."""

    def __init__(self, foundation: torch.nn.Module, edge: torch.nn.Module) -> None:
        self.models = [adaptation.train_only_affine(m).train() for m in (foundation, edge)]
        self.optimizers = [torch.optim.SGD(adaptation.affine(m).values(), lr=1e-4, momentum=0.9) for m in self.models]

    def step(self, uploads: torch.Tensor, batch: torch.Tensor) -> None:
        foundation, edge = self.models
        self._descend(0, adaptation.entropy(foundation(uploads)).mean())
        with torch.no_grad():
            teacher = foundation.eval()(batch)
        foundation.train()
        self._descend(1, F.cross_entropy(edge(batch), teacher.argmax(1)))

    def _descend(self, which: int, loss: torch.Tensor) -> None:
        self.optimizers[which].zero_grad(set_to_none=True)
        loss.backward()
        self.optimizers[which].step()


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
