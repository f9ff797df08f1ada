"""``query.moments``: what a client computes, how it travels, and what noise does to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from trellis.errors import PluginError
from trellis_clients.contract import site_of
from trellis_clients.queries import moments as query
from trellis_clients.trainer import Turn

FILE = Path(__file__).parent / "contract.yaml"


def turn(**config: object) -> Turn:
    return Turn(3, 2, 0, 3, torch.Generator().manual_seed(1), config=config)


def blobs(counts: dict[int, int], size: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), label) for label, n in counts.items()])
    mixed = torch.randperm(len(labels), generator=generator)
    return torch.randn(len(labels), size, generator=generator) + labels[:, None], labels[mixed]


def test_moments_are_numpys_class_by_class():
    features, labels = blobs({4: 30, 1: 2, 7: 1})
    found = query.moments(features, labels)
    assert found.labels.tolist() == [1, 4, 7]
    assert found.counts.tolist() == [2, 30, 1]
    for row, label in enumerate(found.labels):
        z = features[labels == label].double().numpy()
        np.testing.assert_allclose(found.means[row], z.mean(0), atol=1e-12)
        if len(z) > 1:
            np.testing.assert_allclose(found.covariances[row], np.cov(z.T, ddof=1), atol=1e-12)
    assert not found.covariances[2].any()
    assert found.covariances.dtype == torch.float64


def test_rare_classes_stay_at_home():
    features, labels = blobs({0: 3, 1: 2, 2: 1})
    assert query.moments(features, labels, least=3).labels.tolist() == [0]
    nothing = query.encoded(query.moments(features, labels, least=9), {"upload": "packed"})
    assert {name: tuple(values.shape) for name, values in nothing.items()} == {
        "labels": (0,),
        "counts": (0,),
        "means": (0, 5),
        "triangles": (0, 15),
    }


def test_the_answer_is_of_the_features_in_evaluation_mode():
    site = site_of(FILE, ["model={name: small-cnn, norm: batch, width: 2, hidden: 6}"])
    data, model = site.federation.client(0), site.model
    model.train()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    asked, state = turn(precision="float64"), {}
    metrics = site.trainer.answer("moments", model, data, state, asked)
    reply = asked.reply["moments"]
    batch = data.train.batch(torch.arange(len(data.train)))
    with torch.no_grad():
        features = model.eval().features(batch.x)
    wanted = query.moments(features, batch.y)
    assert metrics == {"classes": 10}
    assert int(reply["counts"].sum()) == len(data.train)
    torch.testing.assert_close(reply["means"], wanted.means, atol=1e-6, rtol=0)
    rows, columns = np.triu_indices(6)
    torch.testing.assert_close(reply["triangles"], wanted.covariances[:, rows, columns], atol=1e-6, rtol=0)
    assert state == {}
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name]), name


@pytest.mark.parametrize("rank", [1, 3, 5, 50])
def test_low_rank_keeps_every_variance_and_the_largest_eigenpairs(rank):
    features, labels = blobs({0: 40})
    covariance = query.moments(features, labels).covariances
    factors, residuals = query.low_rank(covariance, min(rank, 5))
    rebuilt = factors.mT @ factors + torch.diag_embed(residuals)
    torch.testing.assert_close(rebuilt.diagonal(dim1=1, dim2=2), covariance.diagonal(dim1=1, dim2=2))
    left_out = torch.linalg.eigvalsh(covariance - factors.mT @ factors)
    assert left_out.max() <= torch.linalg.eigvalsh(covariance)[0, -min(rank, 5) :].min() + 1e-9
    if rank >= 5:
        torch.testing.assert_close(rebuilt, covariance)


def test_low_rank_is_exact_where_features_outnumber_examples():
    features, labels = blobs({0: 4}, size=30)
    covariance = query.moments(features, labels).covariances
    factors, residuals = query.low_rank(covariance, 3)
    torch.testing.assert_close(factors.mT @ factors + torch.diag_embed(residuals), covariance, atol=1e-9, rtol=0)
    assert residuals.max() < 1e-9


def test_layouts_and_precision():
    found = query.moments(*blobs({0: 9, 3: 9}))
    full = query.encoded(found, {"upload": "full", "precision": "float64"})
    assert torch.equal(full["covariances"], found.covariances)
    low = query.encoded(found, {"upload": "low-rank", "rank": 2})
    assert (low["factors"].shape, low["residuals"].shape, low["factors"].dtype) == ((2, 2, 5), (2, 5), torch.float32)
    with pytest.raises(PluginError, match="'square'"):
        query.encoded(found, {"upload": "square"})


def test_a_model_without_a_head_is_said():
    site = site_of(FILE)
    with pytest.raises(PluginError, match="Flatten has no features"):
        query.extract(nn.Flatten(), site.federation.client(0).train)


def test_tiny_noise_gives_the_moments_of_clipped_features():
    features, labels = blobs({0: 50, 2: 40})
    clipped = features.double() * (1.5 / features.double().norm(dim=1, keepdim=True)).clamp(max=1)
    wanted = query.moments(clipped, labels)
    found = query.noisy_moments(features, labels, 4, 1.5, 1e-9, 1, torch.Generator().manual_seed(0))
    assert found.labels.tolist() == [0, 2]
    assert found.counts.tolist() == wanted.counts.tolist()
    torch.testing.assert_close(found.means, wanted.means, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.covariances, wanted.covariances, atol=1e-6, rtol=0)


def test_noise_has_the_deviation_it_says_and_hides_absent_classes():
    """Without examples, a class's noisy count is noise alone: over many classes its deviation shows."""
    clip, multiplier, classes = 2.0, 40.0, 4000
    empty = torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)
    found = query.noisy_moments(*empty, classes, clip, multiplier, 1, torch.Generator().manual_seed(0))
    # Half of a centred normal is above zero, and 1.5 is near enough to it; the mean of that half is sigma sqrt(2 / pi).
    sigma = multiplier * 3**0.5
    assert len(found.labels) == pytest.approx(classes / 2, rel=0.1)
    assert float(found.counts.double().mean()) == pytest.approx(sigma * (2 / np.pi) ** 0.5, rel=0.05)
    assert float(found.means.norm(dim=1).max()) <= clip + 1e-9
    assert float(torch.linalg.eigvalsh(found.covariances).min()) >= -1e-6 * float(found.covariances.abs().max())


def test_the_sensitivity_bounds_what_one_example_can_do():
    """Adding an example moves (count, sum / C, outer / C²) by at most sqrt(3), and by that for a feature of norm C."""
    z = torch.randn(500, 6, generator=torch.Generator().manual_seed(2)).double()
    z = z * (3.0 / z.norm(dim=1, keepdim=True)).clamp(max=1)
    rows, columns = torch.triu_indices(6, 6)
    outer = (z[:, :, None] * z[:, None, :])[:, rows, columns] / 9
    moved = torch.cat([torch.ones(500, 1).double(), z / 3, outer], dim=1).norm(dim=1)
    assert float(moved.max()) <= query.SENSITIVITY
    corner = torch.tensor([3.0, 0, 0, 0, 0, 0]).double()
    assert float(1 + (corner / 3).square().sum() + (torch.outer(corner, corner) / 9).square().sum()) == pytest.approx(3)


def test_seeded_noise_repeats_and_unseeded_does_not():
    site = site_of(FILE)

    def answered(**config):
        asked = turn(**{"noise-multiplier": 0.5, "clip-norm": 3.0, **config})
        site.trainer.answer("moments", site.model, site.federation.client(0), {}, asked)
        return asked.reply["moments"]

    one, same = answered(), answered()
    assert all(torch.equal(one[name], same[name]) for name in one)
    fresh, other = answered(**{"seeded-noise": False}), answered(**{"seeded-noise": False})
    assert fresh["means"].shape != other["means"].shape or not torch.equal(fresh["means"], other["means"])
