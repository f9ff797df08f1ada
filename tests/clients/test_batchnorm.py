"""The three policies for batch norm: what travels, what stays, and what is left in the one live model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict

from trellis import records
from trellis_clients import batchnorm, contract
from trellis_clients.contract import site_of

FILE = Path(__file__).parent / "contract.yaml"
MODEL = ["model={name: small-cnn, norm: batch, width: 4}"]


@pytest.mark.parametrize(
    ("policy", "layers", "statistics"), [("average", True, True), ("recalibrate", True, False), ("local", False, False)]
)
def test_what_travels(policy, layers, statistics):
    site = site_of(FILE, [*MODEL, f"trainer.batch_norm={policy}"])
    norms = [prefix for prefix, _ in batchnorm.layers(site.model)]
    assert norms
    sent = set(site.initial())
    for prefix in norms:
        assert (f"{prefix}.weight" in sent) is layers
        assert (f"{prefix}.running_mean" in sent) is statistics
        assert f"{prefix}.num_batches_tracked" not in sent


@pytest.mark.parametrize("policy", ["average", "recalibrate", "local"])
def test_the_contract_holds(policy):
    contract.check(FILE, [*MODEL, f"trainer.batch_norm={policy}"])


def test_local_layers_come_back_after_another_clients_turn():
    site = site_of(FILE, [*MODEL, "trainer.batch_norm=local"])
    _, first = contract._fit(site, 1, 0, RecordDict())
    _, other = contract._fit(site, 1, 1, RecordDict())
    kept = {n: a.numpy() for n, a in records.array_records(first)["trellis.state.arrays"].items()}
    assert any("running_mean" in name for name in kept)
    assert records.digest(records.array_records(first)["trellis.state.arrays"]) != records.digest(
        records.array_records(other)["trellis.state.arrays"]
    )


def test_recalibration_gives_the_mean_over_the_data():
    layer = torch.nn.BatchNorm1d(3)
    model = torch.nn.Sequential(layer)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * 2 + 5
    batchnorm.recalibrate(model, x.split(16))
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([part.var(0) for part in x.split(16)]).mean(0))
    assert layer.momentum == 0.1


def test_batch_statistics_leave_the_running_ones_alone():
    layer = torch.nn.BatchNorm1d(3).eval()
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * 2 + 5
    with batchnorm.batch_statistics(layer):
        torch.testing.assert_close(layer(x).mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert layer.running_mean is not None
    assert layer.running_mean.tolist() == [0, 0, 0]
