"""The same scenario and seed give the same bits, whatever carries the messages; another scenario gives others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn import functional as F

from federations import DIGITS, lines, run, sha
from oracle_fedavg import fedavg
from trellis import experiment, registry, scenario, seeding
from trellis.data.loading import load_federation
from trellis.grids.base import Layer

SCAFFOLD = DIGITS.replace("name: sgd", "name: scaffold") + "strategy: scaffold\n"
STATEFUL = DIGITS.replace("batch_size: 32", "batch_size: 32, batch_norm: local").replace(
    "{name: mlp, hidden: [16]}", "{name: small-cnn, norm: batch, width: 4}"
)
SCENARIOS = {
    "fedavg": DIGITS,
    "fedadam": DIGITS + "strategy: {name: fedadam, eta: 0.01}\n",
    "median": DIGITS + "strategy: fedmedian\n",
    "private noise": DIGITS + "strategy: {name: dp-server-fixed, noise_multiplier: 0.1, clipping_norm: 1.0}\n",
    "scaffold": SCAFFOLD,
    "local batch norm": STATEFUL,
}


class Reversed(Layer):
    """A grid whose replies come in the opposite order."""

    def stream(self, messages, *, timeout=None):
        return reversed(list(super().stream(messages, timeout=timeout)))


@pytest.mark.parametrize("text", SCENARIOS.values(), ids=SCENARIOS)
def test_twice_reversed_and_resumed_give_the_same_bits(tmp_path, monkeypatch, text):
    first = sha(tmp_path, text=text)
    assert sha(tmp_path, text=text) == first
    assert sha(tmp_path, ("seeds=[1]",), text) != first
    assert resumed(tmp_path, text) == first

    server = experiment.app_module("server")
    ordered = server.Ordered
    monkeypatch.setattr(server, "Ordered", lambda grid: ordered(Reversed(grid)))
    assert sha(tmp_path, text=text) == first


def resumed(folder, text) -> str:
    """Break a run off after its second round, in the middle of the third, and go on with another process's eyes."""

    class Broken(Exception):
        pass

    def break_off(_, line):
        if line["round"] == 2:
            raise Broken

    loaded = scenario.load(_write(folder, text))
    current = experiment.Run.create(folder / "runs", loaded)
    with pytest.raises(Broken):
        experiment.execute(current, experiment.Hooks(on_round=break_off))
    assert [line["round"] for line in lines(current)] == [0, 1, 2]
    outcome = experiment.execute(experiment.Run.open(current.path))
    assert [line["round"] for line in lines(current)] == [0, 1, 2, 3, 4]
    return str(outcome.summaries[0]["sha256"])


def _write(folder, text):
    path = folder / "resumed.yaml"
    path.write_text(text)
    return path


def test_one_and_two_ray_workers_give_the_bits_of_one_process(tmp_path, ray_session):
    for text in (DIGITS, SCAFFOLD):
        local = sha(tmp_path, text=text)
        for workers in (1, 2):
            assert sha(tmp_path, ("runtime.grid=ray", f"runtime.workers={workers}"), text) == local


def test_probing_does_not_change_the_weights(tmp_path):
    probed, outcome = run(tmp_path, ("probe.every=1",))
    assert all(line["probe"]["ratio"] > 0 for line in lines(probed)[1:])
    assert outcome.summaries[0]["overhead"]["samples"] == 4
    plain, bare = run(tmp_path, ("probe.every=0",))
    assert all(line["probe"] is None for line in lines(plain))
    assert bare.summaries[0]["sha256"] == outcome.summaries[0]["sha256"]
    stateful = [sha(tmp_path, (f"probe.every={k}",), SCAFFOLD) for k in (0, 1)]
    assert stateful[0] == stateful[1]


def test_the_oracle_agrees_bit_for_bit(tmp_path):
    """A plain FedAvg with a plain SGD loop, from the same random places, computes the very same model."""
    current, outcome = run(tmp_path)
    each = current.scenario
    federation = load_federation(each, 0)
    cls, config = scenario.config_of(each, "models")
    with seeding.scoped(0, "build"):
        model = cls(config).build(federation.data.example_shape, 10, federation.data.facts)
    names = list(model.state_dict())

    def train(client: int, number: int, weights):
        model.load_state_dict({name: torch.from_numpy(weights[name].copy()) for name in names})
        data, generator = federation.client(client).train, seeding.torch_generator(0, "train", number, client)
        x, y = data.fields["x"][data.rows], data.fields["y"][data.rows]
        for index in torch.randperm(len(y), generator=generator).split(32):
            loss = F.cross_entropy(model(x[index]), y[index])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.add_(gradient, alpha=-0.1)
        return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}

    rows = lines(current, "clients.jsonl")
    cohorts = [[r["client"] for r in rows if r["round"] == k and r["phase"] == "train"] for k in range(1, 5)]
    assert [len(cohort) for cohort in cohorts] == [4] * 4
    with experiment.torch_threads(1):
        initial = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
        expected = fedavg(initial, train, cohorts, {c: len(p) for c, p in enumerate(federation.parts)})
    actual = load_file(current.path / "cells/main-seed0/model.safetensors")
    assert outcome.summaries[0]["rounds"] == 4
    for name in names:
        np.testing.assert_array_equal(actual[name], expected[name])


def test_registry_knows_what_the_scenarios_name():
    assert {"scaffold", "fedadam", "fedmedian", "dp-server-fixed"} <= registry.plugins("strategies").keys()


def test_the_overhead_counts_workers_side_by_side(tmp_path, ray_session):
    """Two workers could halve the bare time at best, so the bare time is the sum over clients halved."""
    current, outcome = run(tmp_path, ("runtime.grid=ray", "runtime.workers=2", "probe.every=1"))
    assert not outcome.failed
    for line in lines(current)[1:]:
        rows = [r for r in lines(current, "clients.jsonl") if r["round"] == line["round"] and r["phase"] == "train"]
        assert line["probe"]["round_s"] >= sum(row["seconds"] for row in rows) / 2
        assert line["probe"]["cpu_ratio"] > 1
