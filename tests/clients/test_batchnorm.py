"""The three policies for batch norm: what travels, what stays, and what is left in the one live model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from sklearn.datasets import load_digits

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


def test_the_cloud_takes_batches_of_all_classes_where_the_statistics_stay_at_the_clients(tmp_path, monkeypatch):
    digits = load_digits()
    rows = np.argsort(digits.target[1400:], kind="stable") + 1400  # stored class by class
    images = digits.images[:, None].astype(np.float32) / 16
    parts = {"x_train": images[:1400], "y_train": digits.target[:1400]}
    np.savez(tmp_path / "digits.npz", x_test=images[rows], y_test=digits.target[rows], **parts)
    data = f"data={{name: npz, path: {tmp_path / 'digits.npz'}}}"
    batches = {}
    for policy in ("average", "local"):
        site = site_of(FILE, [data, *MODEL, f"trainer.batch_norm={policy}", "evaluation.batch_size=100"])
        seen = batches.setdefault(policy, [])
        monkeypatch.setattr(site.trainer, "evaluate", lambda model, split, turn, size, seen=seen: seen.append(split))
        site.evaluate_centrally(site.initial(), 1)
        site.evaluate_centrally(site.initial(), 2)
    sorted_, mixed = ([split.batch(torch.arange(100)).y for split in batches[policy]] for policy in batches)
    assert [len(y.unique()) for y in sorted_] == [3, 3]
    assert [len(y.unique()) for y in mixed] == [10, 10]
    assert torch.equal(*mixed)
    assert sorted(batches["local"][0].rows.tolist()) == sorted(batches["average"][0].rows.tolist())
