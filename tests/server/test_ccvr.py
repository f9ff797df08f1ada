"""CCVR by its parts: pooling against numpy, hostile answers, virtual features, the head, the price of noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as some

import tiny_federation as tiny
from trellis import flower, records
from trellis.errors import ScenarioError
from trellis_server import folding, gaussian_mechanism, moments
from trellis_server.head import Training, accuracy_by_class, retrain
from trellis_server.strategies import build_strategy

flower.enter_run()
EXACT = moments.Layout(classes=4, features=3, dtype="float64")


def blobs(counts: dict[int, int], size: int = 3, seed: int = 0, far: float = 1.0) -> tuple[Any, Any]:
    """Return features with a full covariance around ``far * label``, and labels, shuffled."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(size, size))
    labels = generator.permutation(np.concatenate([np.full(n, label, np.int64) for label, n in counts.items()]))
    return generator.normal(size=(len(labels), size)) @ mix + far * labels[:, None], labels


def arrays_for(features: Any, labels: Any, upload: str = "packed", dtype: str = "float64") -> dict[str, Any]:
    """Return a client's answer as numpy computes it."""
    found, counts = np.unique(labels, return_counts=True)
    size = features.shape[1]
    covariances = np.zeros((len(found), size, size))
    for row, label in enumerate(found):
        if counts[row] > 1:
            covariances[row] = np.cov(features[labels == label].T, ddof=1)
    arrays = {
        "labels": found.astype(np.int64),
        "counts": counts.astype(np.int64),
        "means": np.array([features[labels == label].mean(0) for label in found]).reshape(-1, size),
    }
    if upload == "full":
        arrays["covariances"] = covariances
    elif upload == "packed":
        arrays["triangles"] = covariances[:, *np.triu_indices(size)]
    else:
        values, vectors = np.linalg.eigh(covariances)
        arrays["factors"] = np.sqrt(values.clip(0))[:, :, None] * vectors.swapaxes(1, 2)
        arrays["residuals"] = np.zeros((len(found), size))
    return {k: v if v.dtype == np.int64 else v.astype(dtype) for k, v in arrays.items()}


def read(arrays: dict[str, Any], layout: moments.Layout = EXACT) -> moments.Answer:
    return moments.read(records.array_record(arrays), layout)


def pooled(parts: list[tuple[Any, Any]], layout: moments.Layout = EXACT) -> moments.Pool:
    pool = moments.Pool(layout.features)
    for features, labels in parts:
        pool.add(read(arrays_for(features, labels, layout.upload, layout.dtype), layout))
    return pool


def dealt(features: Any, labels: Any, clients: int, seed: int) -> list[tuple[Any, Any]]:
    """Deal at random; one client gets a single example, one none at all."""
    who = np.random.default_rng(seed).integers(2, clients, len(labels))
    who[0] = 0
    return [(features[who == client], labels[who == client]) for client in range(clients)]


# -- pooling ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(some.integers(0, 10**6), some.integers(3, 9), some.sampled_from(["packed", "full", "low-rank"]))
def test_pooled_moments_are_numpys_over_all_features(seed: int, clients: int, upload: str) -> None:
    features, labels = blobs({0: 40, 1: 17, 2: 2, 3: 1}, seed=seed)
    layout = moments.Layout(4, 3, upload, rank=3, dtype="float64")
    pool = pooled(dealt(features, labels, clients, seed), layout)
    assert pool.classes == [0, 1, 2, 3]
    for label in range(4):
        z = features[labels == label]
        assert pool.count(label) == len(z)
        np.testing.assert_allclose(pool.mean(label), z.mean(0), atol=1e-10)
        wanted = np.cov(z.T, ddof=1) if len(z) > 1 else np.zeros((3, 3))
        np.testing.assert_allclose(pool.covariance(label), wanted, atol=1e-10)


def test_means_a_million_deviations_away_lose_nothing() -> None:
    """Where the paper's form subtracts squares of 1e6, the centred form keeps eight digits."""
    features, labels = blobs({1: 60}, far=1e6)
    pool = pooled(dealt(features, labels, 5, 1))
    np.testing.assert_allclose(pool.covariance(1), np.cov(features.T, ddof=1), rtol=1e-8, atol=1e-8)


def test_order_and_merging_of_clients_do_not_matter() -> None:
    features, labels = blobs({0: 30, 1: 9})
    parts = dealt(features, labels, 5, 2)
    merged = [(np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]])) for a, b in [parts[2:4]]]
    one, other, third = pooled(parts), pooled(parts[::-1]), pooled([*parts[:2], *merged, parts[4]])
    for label in (0, 1):
        for same in (other, third):
            np.testing.assert_allclose(one.covariance(label), same.covariance(label), atol=1e-12)
            np.testing.assert_allclose(one.mean(label), same.mean(label), atol=1e-12)


def test_one_client_and_equal_means() -> None:
    features, labels = blobs({2: 11})
    pool = pooled([(features, labels)])
    assert np.array_equal(pool.mean(2), features.mean(0))
    np.testing.assert_allclose(pool.covariance(2), np.cov(features.T, ddof=1), rtol=1e-12)
    same = np.array([[0.1, 0.2, 0.3]]), np.array([1])
    assert not pooled([same, same, same]).covariance(1).any()
    assert np.array_equal(pooled([same] * 3).mean(1), same[0][0])


def test_shared_covariance_is_that_within_classes() -> None:
    features, labels = blobs({0: 30, 1: 9, 3: 1}, far=50)
    pool = pooled(dealt(features, labels, 4, 0))
    centred = np.concatenate([features[labels == c] - features[labels == c].mean(0) for c in (0, 1, 3)])
    np.testing.assert_allclose(pool.shared_covariance(), centred.T @ centred / (29 + 8), atol=1e-9)


# -- hostile answers ----------------------------------------------------------------------------------


def broken(**changes: Any) -> dict[str, Any]:
    return arrays_for(*blobs({0: 9, 1: 9}), "full") | changes


def poked(name: str, where: Any, value: Any) -> dict[str, Any]:
    arrays = broken()
    arrays[name] = arrays[name].copy()
    arrays[name][where] = value
    return arrays


FULL = moments.Layout(4, 3, "full", dtype="float64")
HOSTILE = {
    "negative count": (poked("counts", 0, -3), "count: counts from -3 to 9"),
    "huge count": (poked("counts", 0, 2**60), "count: .*allowed is 0 to"),
    "unknown label": (poked("labels", 1, 4), "label: class 4 of 4"),
    "negative label": (poked("labels", 1, -1), "label: class -1 of 4"),
    "label twice": (poked("labels", 1, 0), "label: a class stands twice"),
    "nan mean": (poked("means", (0, 0), np.nan), "nonfinite: means"),
    "infinite covariance": (poked("covariances", (1, 2, 2), np.inf), "nonfinite: covariances"),
    "not symmetric": (poked("covariances", (1, 0, 2), 9.0), "symmetry: the covariance of class 1"),
    "negative variance": (poked("covariances", (1, 1, 1), -0.5), "psd: the covariance of class 1"),
    "indefinite": (broken(covariances=np.stack([np.eye(3), np.eye(3) * 2 - 1])), "psd: the covariance of class 1"),
    "covariance without variance": (
        broken(covariances=np.stack([np.eye(3), np.ones((3, 3)) - np.eye(3)])),
        "psd: the covariance of class 1",
    ),
    "wrong width": (broken(means=np.zeros((2, 4))), r"shape: means is float64 \(2, 4\), not float64 \(2, 3\)"),
    "wrong dtype": (broken(means=np.zeros((2, 3), np.float32)), "shape: means is float32"),
    "float labels": (broken(labels=np.array([0.0, 1.0])), "shape: labels is float64"),
    "scalar labels": (broken(labels=np.int64(0)), "oversized: labels of shape"),
    "too many classes": (broken(labels=np.arange(5)), r"oversized: labels of shape \(5,\) for 4 classes"),
    "missing": ({k: v for k, v in broken().items() if k != "counts"}, "names: arrays"),
    "more than asked": (broken(extra=np.zeros(2)), "names: arrays"),
}


@pytest.mark.parametrize(("arrays", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_answers_are_refused(arrays: dict[str, Any], reason: str) -> None:
    with pytest.raises(moments.RefusedError, match=reason):
        read(arrays, FULL)


def test_the_answer_that_was_poked_is_fine_in_itself() -> None:
    assert read(broken(), FULL).counts.tolist() == [9, 9]


def test_no_record_and_payloads_that_lie() -> None:
    with pytest.raises(moments.RefusedError, match="names: no record"):
        moments.read(None, FULL)
    honest = records.array_record(broken())
    for data, reason in ((b"\x93NUMPY" + b"x" * 10**6, "oversized: means has 1000006 bytes"), (b"?", "payload: means")):
        lying = ArrayRecord(dict(honest.items()))
        lying["means"] = Array(dtype="float64", shape=(2, 3), stype="numpy.ndarray", data=data)
        with pytest.raises(moments.RefusedError, match=reason):
            moments.read(lying, FULL)
    lying["means"] = Array(dtype="float64", shape=(2, 3), stype="numpy.ndarray", data=Array(np.zeros((3, 2))).data)
    with pytest.raises(moments.RefusedError, match="is not of the shape and dtype that it says"):
        moments.read(lying, FULL)


def test_negative_residuals_of_a_low_rank_answer() -> None:
    arrays = arrays_for(*blobs({0: 9}), "low-rank")
    arrays["residuals"] = arrays["residuals"] - 1e-9
    with pytest.raises(moments.RefusedError, match="psd: residual variances"):
        read(arrays, moments.Layout(4, 3, "low-rank", 3, "float64"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rounding_is_no_offence(dtype: str, scale: float) -> None:
    """Five examples in 80 dimensions: 76 eigenvalues are zero, and half of them a little less after rounding."""
    features, labels = blobs({0: 5, 1: 300}, size=80)
    for upload in ("packed", "full"):
        layout = moments.Layout(2, 80, upload, dtype=dtype)
        answer = read(arrays_for(features * scale, labels, upload, dtype), layout)
        assert answer.labels.tolist() == [0, 1]


def test_empty_answers_and_rows_of_zero_count_nothing() -> None:
    assert read(arrays_for(np.zeros((0, 3)), np.zeros(0, np.int64))).labels.size == 0
    arrays = arrays_for(*blobs({0: 9, 1: 9}))
    arrays["counts"] = np.array([0, 9])
    assert read(arrays).labels.tolist() == [1]


# -- virtual features ---------------------------------------------------------------------------------


def test_virtual_features_have_the_pooled_moments() -> None:
    features, labels = blobs({0: 50, 3: 20}, far=3)
    pool = pooled(dealt(features, labels, 4, 0))
    count = 100_000
    z, y = moments.virtual_features(pool, {0: count, 3: count}, np.random.default_rng(0))
    assert (z.dtype, z.shape, y.tolist() == [0] * count + [3] * count) == (np.float32, (2 * count, 3), True)
    for label in (0, 3):
        drawn, wanted = z[y == label].astype(float), pool.covariance(label)
        scale = wanted.trace()
        np.testing.assert_allclose(drawn.mean(0), pool.mean(label), atol=4 * math.sqrt(scale / count))
        np.testing.assert_allclose(np.cov(drawn.T), wanted, atol=8 * scale / math.sqrt(count))


def test_the_same_seed_draws_the_same_features() -> None:
    pool = pooled([blobs({0: 9, 1: 5})])
    draw = [moments.virtual_features(pool, {0: 4, 1: 4}, np.random.default_rng(s))[0] for s in (1, 1, 2)]
    assert np.array_equal(draw[0], draw[1])
    assert not np.array_equal(draw[0], draw[2])


def test_more_features_than_examples() -> None:
    features, labels = blobs({0: 6}, size=40)
    pool = pooled([(features, labels)], moments.Layout(1, 40, dtype="float64"))
    for ridge in (0.0, 1e-6):
        root = moments.root(pool.covariance(0), ridge)
        np.testing.assert_allclose(root @ root.T, pool.covariance(0), atol=1e-4 * pool.covariance(0).trace() / 40)
        z, _ = moments.virtual_features(pool, {0: 50}, np.random.default_rng(0), ridge=ridge)
        assert np.isfinite(z).all()
        assert np.linalg.matrix_rank(z - z.mean(0), tol=0.1) == 5


def test_a_class_of_one_example_takes_the_covariance_within_classes() -> None:
    features, labels = blobs({0: 400, 1: 1}, far=5)
    pool = pooled([(features, labels)])
    z, y = moments.virtual_features(pool, {0: 5, 1: 50_000}, np.random.default_rng(0))
    drawn = z[y == 1].astype(float)
    scale = pool.shared_covariance().trace()
    np.testing.assert_allclose(drawn.mean(0), features[labels == 1][0], atol=0.05 * math.sqrt(scale))
    np.testing.assert_allclose(np.cov(drawn.T), pool.shared_covariance(), atol=0.05 * scale)


def test_a_federation_of_single_examples_draws_its_means() -> None:
    features, labels = blobs({0: 1, 1: 1})
    z, y = moments.virtual_features(pooled([(features, labels)]), {0: 3, 1: 2}, np.random.default_rng(0))
    for label in (0, 1):
        assert (z[y == label] == features[labels == label].astype(np.float32)).all()


def test_shrinkage_goes_from_the_classes_own_to_the_shared_covariance() -> None:
    features, labels = blobs({0: 200, 1: 5})
    pool = pooled([(features, labels)])
    count, scale = 50_000, pool.covariance(0).trace()
    for shrinkage, wanted in (
        (0.0, pool.covariance(1)),
        (4.0, (pool.covariance(1) + pool.shared_covariance()) / 2),
        (1e9, pool.shared_covariance()),
    ):
        z, _ = moments.virtual_features(pool, {1: count}, np.random.default_rng(0), shrinkage=shrinkage)
        np.testing.assert_allclose(np.cov(z.T.astype(float)), wanted, atol=0.05 * scale)


def test_amounts() -> None:
    pool = pooled([blobs({0: 90, 1: 9, 2: 1})])
    assert moments.amounts(pool, 10, [0, 1, 2], proportional=False) == {0: 10, 1: 10, 2: 10}
    assert moments.amounts(pool, 10, [0, 1, 2], proportional=True) == {0: 27, 1: 3, 2: 1}


# -- the head -----------------------------------------------------------------------------------------


def head(classes: int = 4, size: int = 3, bias: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(classes, size, generator=generator), *([torch.zeros(classes)] if bias else [])]


def training(**changes: Any) -> Training:
    return Training(**{"epochs": 20, "lr": 0.1, "momentum": 0.9, "batch_size": 16, **changes})


@pytest.mark.parametrize("bias", [True, False])
def test_retraining_learns_and_leaves_unreported_classes_alone(bias: bool) -> None:
    labels = np.repeat([0, 2, 3], 60)
    generator = np.random.default_rng(0)
    features = 3 * np.eye(3)[np.repeat([0, 1, 2], 60)] + 0.3 * generator.normal(size=(180, 3))
    before = head(bias=bias)
    kept = [values.clone() for values in before]
    after = retrain(before, features.astype(np.float32), labels, training(), torch.Generator().manual_seed(1))
    assert len(after) == 1 + bias
    for old, new, copy in zip(before, after, kept, strict=True):
        assert torch.equal(old, copy)
        assert torch.equal(new[1], old[1])
        assert not torch.equal(new[0], old[0])
    z, y = torch.from_numpy(features).float(), torch.from_numpy(labels)
    seen = [values[[0, 2, 3]] for values in after]
    right = torch.nn.functional.linear(z, *seen).argmax(1) == torch.bucketize(y, torch.tensor([0, 2, 3]))
    assert right.double().mean() > 0.9


def test_no_steps_no_change_and_the_same_seed_the_same_bits() -> None:
    features, labels = blobs({0: 30, 1: 30})
    z = features.astype(np.float32)
    still = retrain(head(), z, labels, training(epochs=0), torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(still, head(), strict=True))
    one, same, other = (retrain(head(), z, labels, training(), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one[0], same[0])
    assert not torch.equal(one[0], other[0])


def test_a_step_is_sgd_on_cross_entropy() -> None:
    features, labels = blobs({0: 4, 1: 3, 2: 2, 3: 2})
    z, y = torch.from_numpy(features).float(), torch.from_numpy(labels)
    before = [values.requires_grad_() for values in head()]
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(z @ before[0].T + before[1], y), before)
    step = training(epochs=1, momentum=0.0, batch_size=99)
    after = retrain(head(), z.numpy(), labels, step, torch.Generator())
    for old, gradient, new in zip(before, gradients, after, strict=True):
        torch.testing.assert_close(new, old.detach() - 0.1 * gradient)


def test_accuracy_by_class() -> None:
    weight = torch.eye(3)
    features = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]])
    total, by_class = accuracy_by_class([weight], features, torch.tensor([0, 1, 1, 2]))
    assert total == 0.75
    assert by_class == {0: 1.0, 1: 0.5, 2: 1.0}
    assert list(accuracy_by_class([weight], features[:2], torch.tensor([2, 0]))[1]) == [0, 2]


# -- the price of noise -------------------------------------------------------------------------------


def test_epsilon_of_the_gaussian_mechanism() -> None:
    """The classic bound sqrt(2 ln(1.25 / delta)) / multiplier holds below 1, and the exact value is smaller."""
    for multiplier in (10.0, 20.0, 50.0):
        classic = math.sqrt(2 * math.log(1.25 / 1e-5)) / multiplier
        exact = gaussian_mechanism.epsilon(multiplier, 1e-5)
        assert 0.5 * classic < exact < classic
        assert gaussian_mechanism.delta(exact, multiplier) <= 1e-5
        assert gaussian_mechanism.delta(exact * 0.999, multiplier) > 1e-5


def test_delta_is_the_divergence_of_two_normals() -> None:
    """delta(epsilon) = integral of max(p - e^epsilon q, 0), computed on a grid."""
    grid = np.linspace(-30, 30, 2_000_001)
    for multiplier, at in ((1.0, 1.0), (0.5, 3.0), (3.0, 0.1)):
        p, q = (np.exp(-((grid - m) ** 2) / 2) / math.sqrt(2 * math.pi) for m in (1 / multiplier, 0.0))
        wanted = np.clip(p - math.exp(at) * q, 0, None).sum() * (grid[1] - grid[0])
        assert gaussian_mechanism.delta(at, multiplier) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("multiplier", [1e-3, 0.05, 1.0, 1e6])
def test_epsilon_of_little_and_much_noise(multiplier: float) -> None:
    spent = gaussian_mechanism.epsilon(multiplier, 1e-5)
    assert 0 <= spent < math.inf
    assert (spent == 0) == (multiplier == 1e6)


# -- around another strategy --------------------------------------------------------------------------


def test_rounds_are_the_bases() -> None:
    start = tiny.initial("ccvr")
    for base in ("fedavg", "fedadam", "fedmedian", "krum"):
        around, alone = (
            tiny.Rounds(tiny.build("ccvr", cohort=5, base=base)),
            tiny.Rounds(tiny.build(base, cohort=5)),
        )
        assert records.digest(around.run(start, range(1, 4))) == records.digest(alone.run(start, range(1, 4)))
        assert around.fold == alone.fold
        assert around.cohorts == alone.cohorts
        assert around.metrics == alone.metrics


@pytest.mark.parametrize(("base", "folds"), [("fedavg", True), ("fedadam", True), ("fedmedian", False)])
def test_folding_sees_through_the_wrapper(base: str, folds: bool) -> None:
    strategy = tiny.build("ccvr", base=base)
    assert folding.folds(strategy) is folds
    assert folding.merger(strategy) is strategy.inner
    assert folding.merger(strategy.inner) is strategy.inner


def test_folding_ignores_an_inner_that_is_no_strategy() -> None:
    strategy = FedAvg()
    strategy.inner = "core"
    assert folding.merger(strategy) is strategy
    assert folding.folds(strategy)


def test_the_short_way_is_that_of_the_base() -> None:
    strategy, start = tiny.build("ccvr"), tiny.initial("ccvr")
    content = RecordDict({"arrays": start, "metrics": MetricRecord({"num-examples": 3, "loss": 1.0})})
    reply = flower.reply(content, Message(RecordDict(), flower.node_of(0), "train"))
    arrays, metrics = folding.aggregate(strategy, 1, folding.folded(strategy, [reply]))
    assert arrays is not None
    assert records.digest(arrays) == records.digest(start)
    assert dict(metrics or {}) == {"loss": 1.0}


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"clients": 9}, "strategy.clients is 9, but there are only 8 clients"),
        ({"clients": 3, "min_clients": 4}, "strategy.min_clients is 4, but only 3 are asked"),
        ({"base": {"name": "fedavgm", "server_momentm": 0.9}}, "strategy.base.server_momentm"),
        ({"base": "scaffold"}, "'scaffold' merges scaffold"),
        ({"virtual_per_class": 0}, "strategy.virtual_per_class"),
        ({"noise": {"multiplier": 1.0}}, "strategy.noise.clip_norm"),
    ],
)
def test_wrong_parameters(params: dict[str, Any], reason: str) -> None:
    with pytest.raises(ScenarioError, match=reason):
        build_strategy(tiny.scenario_for("ccvr", **params), tiny.CLIENTS, 0)


def test_it_cannot_be_wrapped() -> None:
    with pytest.raises(ScenarioError, match="must be the outermost strategy"):
        tiny.build("dp-server-fixed", base="ccvr")
