"""R: a round's time over that of the same training steps as a bare loop, by the run's own probe."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from measuring import Row, row, run_rounds

TINY = """\
name: tiny-cnn
data: digits
clients: 20
model: small-cnn
trainer: {{name: sgd, lr: 0.1, batch_size: {batch_size}}}
rounds: {{count: {rounds}}}
evaluation: {{central_every: 0, federated_every: 0}}
probe: {{every: 1}}
runtime: {{grid: local}}
"""

RESNET = """\
name: resnet
data: {{name: digits, size: 32, channels: 3}}
clients: 8
model: resnet
trainer: {{name: sgd, lr: 0.1, batch_size: 32}}
rounds: {{count: {rounds}, clients_per_round: 2}}
evaluation: {{central_every: 0, federated_every: 0}}
probe: {{every: 1}}
runtime: {{grid: local}}
"""


def rows(quick: bool) -> Iterator[Row]:
    """Three models: a tiny one with ten examples a step, with 32 (two steps a client), and a ResNet-8."""
    rounds = 8 if quick else 60
    for size, steps in ((10, 6), (32, 2)):
        text = TINY.format(rounds=rounds, batch_size=size)
        yield _ratio(f"tiny-cnn-{size}", f"R, tiny CNN, {steps} steps of {size} a client", text, 1.30, 1.15)
    text = RESNET.format(rounds=5 if quick else 20)
    yield _ratio("resnet", "R, ResNet-8 at 32x32, 5 steps of 32 a client", text, 1.10, 1.03)


def _ratio(name: str, quantity: str, text: str, target: float, aim: float) -> Row:
    probes = [line["probe"] for line in run_rounds(text).lines if line["probe"]]
    cpu = median(probe["cpu_ratio"] for probe in probes)
    wall = [probe["ratio"] for probe in probes]
    bare = median(probe["bare_s"] for probe in probes)
    return row(name, quantity, "x", wall, cpu=cpu, target=target, aim=aim, note=f"bare round {1000 * bare:.0f} ms")
