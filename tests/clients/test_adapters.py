"""The forward-only adapters: what their papers say exactly, what they keep, and what they refuse."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.neighbors import kneighbors_graph
from torch import nn
from torch.nn import functional as F

from trellis import seeding
from trellis.errors import DataError, TrellisError
from trellis.models._base import Classifier
from trellis.models.zoo.small_cnn import SmallCnn
from trellis.models.zoo.vit import Vit
from trellis_clients.edge import adapters
from trellis_clients.edge.adapters import lame
from trellis_clients.edge.adapters._base import Reader, entropy, log_softmax, normalised
from trellis_clients.edge.adapters._evolution import Evolution, population
from trellis_clients.edge.predictor import Prediction
from trellis_clients.torch_predictor import TorchPredictor
from trellis_clients.trainers.cloud_edge._forward_only import StreamPredictor

SHAPE, CLASSES = (1, 8, 8), tuple("abcde")


def cnn() -> nn.Module:
    """Return an untrained network whose batch norms have statistics of their own."""
    with seeding.scoped(0, "cnn"):
        model = SmallCnn(SmallCnn.Config(width=4, hidden=16, norm="batch")).build(SHAPE, len(CLASSES), {})
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.data.uniform_(0.5, 1.5)
    return model.eval()


def vit() -> nn.Module:
    with seeding.scoped(0, "vit"):
        model = Vit(Vit.Config(patch=4, dim=16, depth=3, heads=2)).build(SHAPE, len(CLASSES), {})
        model.head.weight.data.mul_(30)  # untrained heads are nearly indifferent
    return model.eval()


def predictor(model: nn.Module) -> StreamPredictor:
    return StreamPredictor(model, CLASSES, SHAPE)


def batches(count: int = 4, size: int = 12, number: int = 0) -> list[np.ndarray]:
    draws = np.random.default_rng(number)
    return [draws.normal(0.3 * k, 1, (size, *SHAPE)).astype(np.float32) for k in range(count)]


class Canned:
    """A linear head over features that are given as they are: the predictor of ``lambda z: W z + b``."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray) -> None:
        self.head = (weight.astype(np.float32), bias.astype(np.float32))
        self.classes = tuple(str(k) for k in range(len(weight)))
        self.shape = (weight.shape[1],)
        self.prompt_width, self.has_batch_norm = None, False

    def __call__(self, x, **_) -> Prediction:
        weight, bias = self.head
        return Prediction((x @ weight.T + bias).astype(np.float32), np.asarray(x, np.float32), None)


def canned(classes: int = 4, width: int = 6, number: int = 0) -> Canned:
    draws = np.random.default_rng(number)
    return Canned(3 * normalised(draws.normal(size=(classes, width))), draws.normal(size=classes) * 0.1)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(logits))


EVERY = {
    "none": (cnn, {}),
    "prediction-bn": (cnn, {}),
    "prediction-bn moving": (cnn, {"moving": True}),
    "t3a": (cnn, {"supports": 3}),
    "lame": (cnn, {}),
    "lame rbf": (vit, {"affinity": "rbf"}),
    "foa": (vit, {"prompts": 2}),
    "foa shift only": (cnn, {"prompts": 0}),
}


def create(case: str, seen: int = 8) -> adapters.Adapter:
    """Return an adapter of ``EVERY`` that has seen clean examples where it needs them."""
    make, options = EVERY[case]
    adapter = adapters.create(case.split()[0], predictor(make()), **options)
    if adapter.needs_source:
        adapter.prepare(batches(1, seen, number=9)[0])
    return adapter


# -- all of them ------------------------------------------------------------------------------------------


def test_every_adapter_is_tried_here():
    assert {case.split()[0] for case in EVERY} == set(adapters.NAMES)


@pytest.mark.parametrize("case", EVERY)
@pytest.mark.parametrize("size", [1, 2, 12])
def test_any_batch_size_gives_finite_logits_and_leaves_the_model_alone(case, size):
    adapter = create(case)
    model = adapter.predictor.model
    before = {name: values.clone() for name, values in model.state_dict().items()}
    for x in batches(3, size):
        answer = adapter.predict(x)
        assert answer.shape == (size, len(CLASSES)) and answer.dtype == np.float32
        assert np.isfinite(answer).all()
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name]), name
    assert all(isinstance(value, float) and math.isfinite(value) for value in adapter.metrics().values())


@pytest.mark.parametrize("case", EVERY)
def test_a_stream_that_was_interrupted_gives_the_same_bits(case):
    straight, first, stream = create(case), create(case), batches(7)
    expected = [straight.predict(x) for x in stream]
    got = [first.predict(x) for x in stream[:3]]
    for number, x in enumerate(stream[3:], 3):  # a new process for each further batch
        state = first.state()
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in state.items()}
        assert json.loads(json.dumps(plain)) == plain  # arrays, numbers and text, nothing else
        np.random.default_rng(number).normal(size=10)
        first = adapters.create(case.split()[0], predictor(EVERY[case][0]()), **EVERY[case][1])
        first.load_state(state)
        got.append(first.predict(x))
    for a, b in zip(expected, got, strict=True):
        assert a.tobytes() == b.tobytes()
    assert first.state().keys() == straight.state().keys()


@pytest.mark.parametrize("case", EVERY)
def test_a_state_is_a_copy_and_reset_forgets_the_stream(case):
    adapter, stream = create(case), batches(3)
    fresh = adapter.state()
    first = [adapter.predict(x) for x in stream]
    state = adapter.state()
    kept = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in state.items()}
    adapter.predict(stream[0])
    for name, value in kept.items():
        assert np.array_equal(value, state[name]), name
    adapter.reset()
    assert adapter.state().keys() == fresh.keys()
    for a, b in zip(first, [adapter.predict(x) for x in stream], strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("case", EVERY)
def test_draws_come_from_no_process_wide_generator(case):
    def states():
        return np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()

    answers = []
    for number in (1, 2):
        np.random.seed(number), random.seed(number), torch.manual_seed(number)
        before = states()
        adapter = create(case)
        answers.append([adapter.predict(x) for x in batches(3)])
        after = states()
        assert np.array_equal(before[0], after[0]) and before[1] == after[1] and torch.equal(before[2], after[2])
    assert all(np.array_equal(a, b) for a, b in zip(*answers, strict=True))


@pytest.mark.parametrize("case", EVERY)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(case):
    adapter, stream = create(case), batches(3)
    adapter.predict(stream[0])
    good = adapter.state()
    bad = [{**good, "adapter": "other"}, {k: v for k, v in good.items() if k != "adapter"}, {**good, "stranger": 1.0}]
    for name, value in good.items():
        if isinstance(value, np.ndarray) and value.size:
            bad.append({**good, name: value[..., None]})
            bad.append({**good, name: value.astype(str)})
            if value.dtype.kind == "f":
                bad.append({**good, name: np.full_like(value, np.nan)})
        elif name != "adapter":
            bad += [{**good, name: "seven"}, {**good, name: float("nan")}, {**good, name: -1}]
    required = {"t3a": ["supports", "labels"], "foa": ["batches"], "foa shift": ["batches"]}
    bad += [{k: v for k, v in good.items() if k != name} for name in required.get(" ".join(case.split()[:2]), [])]
    for state in bad:
        with pytest.raises(DataError) as caught:
            adapter.load_state(state)
        assert caught.value.code == "adapter-state"
    other = create(case)
    other.load_state(good)
    for x in stream[1:]:
        assert np.array_equal(adapter.predict(x), other.predict(x))


def test_names_and_options_are_checked():
    model = predictor(cnn())
    for name, options, code, text in [
        ("t4a", {}, "adapter-unknown", "Did you mean 't3a'"),
        ("t3a", {"support": 3}, "adapter-option", "Did you mean 'supports'"),
        ("t3a", {"supports": 0}, "adapter-option", "supports=0"),
        ("lame", {"affinity": "near"}, "adapter-option", "affinity='near'"),
        ("prediction-bn", {"prior": float("nan")}, "adapter-option", "prior=nan"),
        ("prediction-bn", {"prior": None, "moving": True}, "adapter-option", "finite prior"),
        ("none", {"a": 1}, "adapter-option", "It has none"),
        ("foa", {}, "adapter-prompts", "takes none"),
    ]:
        with pytest.raises(TrellisError, match=text) as caught:
            adapters.create(name, model, **options)
        assert caught.value.code == code
    for name in ("prediction-bn", "prediction-bn"):
        with pytest.raises(DataError, match="batch normalisation") as caught:
            adapters.create(name, predictor(vit()))
        assert caught.value.code == "adapter-batch-norm"
    with pytest.raises(DataError, match="moving=true") as caught:
        adapters.create("prediction-bn", _still(), moving=True)
    assert caught.value.code == "adapter-batch-norm"


def _still() -> Canned:
    model = canned()
    model.has_batch_norm = True
    return model


def test_adapters_load_neither_torch_nor_the_platform():
    code = (
        "import sys\nfrom trellis_clients.edge import adapters\n"
        "assert 'cma' not in sys.modules\n"
        "[adapters.named(name) for name in adapters.NAMES]\n"
        "print(sorted({'torch', 'flwr', 'ray', 'trellis.data', 'trellis.models', 'sklearn'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# -- prediction-time batch norm ---------------------------------------------------------------------------


class OneNorm(Classifier):
    """A batch norm, and nothing else before the head."""

    def __init__(self, channels: int = 3, side: int = 4) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels * side * side, 2)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        self.norm.weight.data.uniform_(0.5, 2)
        self.norm.bias.data.uniform_(-1, 1)

    def features(self, x):
        return self.norm(x).flatten(1)


def one_norm(**options):
    with seeding.scoped(0, "one"):
        model = OneNorm().eval()
    return model, adapters.create("prediction-bn", StreamPredictor(model, ("a", "b"), (3, 4, 4)), **options)


def colours(count: int, size: int = 8) -> list[np.ndarray]:
    draws = np.random.default_rng(5)
    return [draws.normal(0.5 * k, 2, (size, 3, 4, 4)).astype(np.float32) for k in range(count)]


def by_hand(model: OneNorm, x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> torch.Tensor:
    """Return logits under given statistics, in float64."""
    norm, head = model.norm, model.head
    tensors = [torch.from_numpy(np.asarray(v)).double() for v in (x, mean, var)]
    out = F.batch_norm(*tensors, norm.weight.double(), norm.bias.double(), eps=norm.eps)
    return F.linear(out.flatten(1), head.weight.double(), head.bias.double()).detach()


def own(model: OneNorm) -> tuple[np.ndarray, np.ndarray]:
    return model.norm.running_mean.double().numpy(), model.norm.running_var.double().numpy()


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.astype(np.float64).mean((0, 2, 3)), x.astype(np.float64).var((0, 2, 3))


def test_prior_zero_is_the_layer_in_training_mode_and_none_is_evaluation_mode():
    x = batches(1)[0]
    batch, source = (
        adapters.create("prediction-bn", predictor(cnn()), prior=prior).predict(x) for prior in (0.0, None)
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(source), cnn()(torch.from_numpy(x)))
        torch.testing.assert_close(torch.from_numpy(batch), cnn().train()(torch.from_numpy(x)), rtol=1e-4, atol=1e-5)
    assert np.abs(batch - source).max() > 0.01


def test_a_prior_of_n_is_the_midpoint_and_any_prior_the_mix_of_biased_moments():
    (x,) = colours(1)
    for prior, share in ((8.0, 0.5), (16.0, 1 / 3), (0.0, 1.0)):
        model, adapter = one_norm(prior=prior)
        mean, var = ((1 - share) * a + share * b for a, b in zip(own(model), moments(x), strict=True))
        expected = by_hand(model, x, mean, var)
        torch.testing.assert_close(torch.from_numpy(adapter.predict(x)).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_fixed_weight_does_not_depend_on_the_batch_size():
    for size in (1, 2, 8):
        (x,) = colours(1, size)
        model, adapter = one_norm(weight=0.1)
        mean, var = (0.9 * a + 0.1 * b for a, b in zip(own(model), moments(x), strict=True))
        expected = by_hand(model, x, mean, var)
        torch.testing.assert_close(torch.from_numpy(adapter.predict(x)).double(), expected, rtol=1e-4, atol=1e-4)


def test_moving_statistics_start_from_the_last_mix_and_plain_ones_from_the_source():
    stream = colours(3)
    model, moving = one_norm(prior=8.0, moving=True)
    _, plain = one_norm(prior=8.0)
    mean, var = own(model)
    for number, x in enumerate(stream):
        mean, var = ((a + b) / 2 for a, b in zip((mean, var), moments(x), strict=True))
        answer = moving.predict(x)
        expected = by_hand(model, x, mean, var)
        torch.testing.assert_close(torch.from_numpy(answer).double(), expected, rtol=1e-4, atol=1e-4)
        assert np.allclose(answer, plain.predict(x), atol=1e-5) == (number == 0)
    np.testing.assert_allclose(moving.state()["statistics.norm.running_mean"], mean, rtol=1e-5, atol=1e-5)
    assert set(plain.state()) == {"adapter"}


def test_one_example_on_a_map_of_one_pixel_has_no_variance_and_gives_the_shift():
    with seeding.scoped(0, "one"):
        model = OneNorm(side=1).eval()
    adapter = adapters.create("prediction-bn", TorchPredictor(model, ("a", "b"), (3, 1, 1)), prior=0.0)
    answer = adapter.predict(np.random.default_rng(0).normal(size=(1, 3, 1, 1)).astype(np.float32))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(answer), model.head(model.norm.bias[None]), rtol=1e-4, atol=1e-4)


# -- T3A --------------------------------------------------------------------------------------------------


def test_before_any_stream_the_centroids_are_the_rows_directions():
    weight = np.eye(4, 6) * np.array([[1.0], [2.0], [3.0], [4.0]])
    model = Canned(weight, np.zeros(4))
    adapter = adapters.create("t3a", model)
    np.testing.assert_allclose(adapter.centroids(), normalised(weight), atol=1e-7)
    z = np.random.default_rng(0).normal(size=(5, 6))
    np.testing.assert_allclose(z @ adapter.centroids().T, z @ (weight / np.linalg.norm(weight, axis=1)[:, None]).T)


def t3a_by_hand(model: Canned, stream: list[np.ndarray], supports: int | None) -> list[np.ndarray]:
    """Algorithm 1, one support at a time."""
    weight, bias = (v.astype(np.float64) for v in model.head)
    per_class: dict[int, list[tuple[float, np.ndarray]]] = {k: [] for k in range(len(weight))}

    def add(z):
        logits = weight @ z + bias
        p = softmax(logits[None])[0]
        per_class[int(logits.argmax())].append((-(p * np.log(p)).sum(), z / np.linalg.norm(z)))

    for row in weight:
        add(row)
    answers = []
    for x in stream:
        for z in x.astype(np.float64):
            add(z)
        centroids = []
        for k, members in per_class.items():
            members.sort(key=lambda each: each[0])
            del members[supports if supports is not None else len(members) :]
            total = sum(z for _, z in members) if members else weight[k]
            centroids.append(total / np.linalg.norm(total))
        answers.append(x @ np.array(centroids).T)
    return answers


@pytest.mark.parametrize("supports", [1, 3, None])
def test_t3a_is_the_papers_algorithm(supports):
    model, draws = canned(), np.random.default_rng(1)
    stream = [draws.normal(size=(9, 6)).astype(np.float32) for _ in range(5)]
    adapter = adapters.create("t3a", model, supports=supports)
    for x, expected in zip(stream, t3a_by_hand(model, stream, supports), strict=True):
        np.testing.assert_allclose(adapter.predict(x), expected, rtol=1e-4, atol=1e-5)
    state = adapter.state()
    counts = np.bincount(state["labels"], minlength=4)
    assert (len(state["labels"]) == 4 + 45) if supports is None else counts.max() <= supports


def test_t3a_keeps_the_supports_of_lowest_entropy_per_class():
    model, draws = canned(), np.random.default_rng(2)
    stream = [draws.normal(size=(20, 6)).astype(np.float32) for _ in range(4)]
    adapter = adapters.create("t3a", model, supports=3)
    everything = np.concatenate([model.head[0], *stream])
    logits = everything @ model.head[0].T + model.head[1]
    for x in stream:
        adapter.predict(x)
    state = adapter.state()
    for k in range(4):
        own = np.sort(entropy(logits[logits.argmax(1) == k]))[:3]
        np.testing.assert_allclose(np.sort(state["entropies"][state["labels"] == k]), own, rtol=1e-4, atol=1e-6)


def test_a_features_length_does_not_count_in_its_centroid():
    """A head that looks at directions only gives the same labels and entropies to a feature and its double."""

    class Cosine(Canned):
        def __call__(self, x, **_):
            return Prediction(
                super().__call__(normalised(x).astype(np.float32)).logits, np.asarray(x, np.float32), None
            )

    draws = np.random.default_rng(3)
    x = draws.normal(size=(10, 6)).astype(np.float32)
    factors = draws.uniform(0.1, 10, (10, 1)).astype(np.float32)
    plain, scaled = (adapters.create("t3a", Cosine(*canned().head)) for _ in range(2))
    answer, other = plain.predict(x), scaled.predict(x * factors)
    np.testing.assert_allclose(plain.centroids(), scaled.centroids(), atol=1e-6)
    np.testing.assert_allclose(other, answer * factors, rtol=1e-4, atol=1e-5)


def test_a_class_that_has_no_support_keeps_its_row():
    weight = np.array([[1.0, 0.0], [0.5, 0.1], [0.0, 1.0]])  # the second row is closest to the first class
    adapter = adapters.create("t3a", Canned(weight, np.zeros(3)))
    assert adapter.state()["labels"].tolist() == [0, 0, 2]
    np.testing.assert_allclose(adapter.centroids()[1], normalised(weight)[1], atol=1e-7)


def test_new_weights_drop_the_supports():
    model = cnn()
    adapter = adapters.create("t3a", predictor(model))
    adapter.predict(batches(1)[0])
    model.head.weight.data.mul_(-1)
    adapter.weights_changed()
    np.testing.assert_allclose(
        adapter.state()["supports"].sum(0), -normalised(cnn().head.weight.data).sum(0), atol=1e-6
    )


# -- LAME -------------------------------------------------------------------------------------------------


def scene(n: int = 20, classes: int = 4, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities and features of length 1."""
    draws = np.random.default_rng(n)
    return log_softmax(draws.normal(size=(n, classes))), normalised(draws.normal(size=(n, width)))


def test_without_affinity_lame_is_the_softmax():
    log_q, _ = scene()
    log_y, _ = lame.agree(log_q, np.zeros((20, 20)))
    np.testing.assert_allclose(np.exp(log_y), np.exp(log_q), rtol=1e-6, atol=1e-9)


def test_one_example_has_no_neighbour():
    adapter, plain = adapters.create("lame", predictor(cnn())), adapters.create("none", predictor(cnn()))
    (x,) = batches(1, 1)
    np.testing.assert_allclose(softmax(adapter.predict(x)), softmax(plain.predict(x)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["rbf", "linear"])
def test_with_a_positive_semidefinite_affinity_the_energy_of_each_pair_once_never_rises(kind):
    log_q, features = scene()
    weights = lame.affinity(features, kind, 5, False)
    assert np.linalg.eigvalsh(weights).min() > -1e-9
    logged = np.log(np.exp(log_q) + 1e-10)

    def energy(log_y):
        y = np.exp(log_y)
        return float((y * (log_y - logged)).sum() - 0.5 * np.einsum("ij,ik,jk->", weights, y, y))

    energies = [energy(log_softmax(logged))] + [energy(lame.agree(log_q, weights, steps)[0]) for steps in range(1, 25)]
    assert all(b <= a + 1e-10 for a, b in pairwise(energies))
    assert energies[-1] < energies[0] - 0.1


@pytest.mark.parametrize("case", [{}, {"affinity": "rbf"}, {"affinity": "linear"}, {"symmetric": True}])
def test_lame_gives_probabilities_and_follows_a_permutation_of_the_batch(case):
    adapter, (x,) = adapters.create("lame", predictor(cnn()), **case), batches(1, 15)
    order = np.random.default_rng(0).permutation(15)
    answer, moved = adapter.predict(x), adapter.predict(x[order])
    np.testing.assert_allclose(np.exp(answer.astype(np.float64)).sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(np.exp(moved), np.exp(answer[order]), atol=1e-5)


def test_affinities_are_those_of_an_independent_library():
    _, features = scene(30)
    graph = kneighbors_graph(features, 5, include_self=False).toarray()
    np.testing.assert_array_equal(lame.affinity(features, "knn", 5, False), graph)
    np.testing.assert_array_equal(lame.affinity(features, "knn", 5, True), (graph + graph.T) / 2)
    # The k-th neighbour counts the example itself, as in the official code.
    width = kneighbors_graph(features, 4, mode="distance", include_self=False).toarray().max(1).mean()
    np.testing.assert_allclose(lame.affinity(features, "rbf", 5, False), rbf_kernel(features, gamma=1 / (2 * width**2)))
    assert lame.affinity(features[:3], "knn", 5, False).sum() == 6  # fewer than k others: all of them
    np.testing.assert_array_equal(lame.affinity(features, "rbf", 1, False), np.eye(30))


def test_neighbours_pull_an_unsure_answer_to_their_class():
    log_q = np.log(np.array([[0.95, 0.05], [0.95, 0.05], [0.9, 0.1], [0.4, 0.6]]))
    log_y, steps = lame.agree(log_q, np.ones((4, 4)) - np.eye(4))
    assert log_y.argmax(1).tolist() == [0, 0, 0, 0]
    assert 2 < steps < 100


# -- FOA --------------------------------------------------------------------------------------------------


def foa(model: nn.Module | None = None, **options):
    adapter = adapters.create("foa", predictor(vit() if model is None else model), **options)
    adapter.prepare(batches(1, 32, number=9)[0])
    return adapter


def test_the_population_is_the_librarys():
    assert population(3 * 768) == 27
    for dimension in (2, 10, 64, 100):
        assert Evolution(dimension, 1.0, None, 0)._search.popsize == population(dimension)
    assert len(Evolution(8, 1.0, 16, 0).ask()) == 16


def test_a_batch_costs_population_plus_one_forwards_and_shift_only_one():
    adapter, (x,) = foa(prompts=2, population=6), batches(1)
    before = adapter.forwards
    adapter.predict(x)
    assert adapter.forwards - before == 7 * len(x)
    adapter = foa(prompts=0)
    before = adapter.forwards
    adapter.predict(x)
    assert adapter.forwards - before == len(x)


def test_fitness_is_entropy_plus_the_distance_of_the_layers_statistics():
    model, source, (x,) = vit(), batches(1, 32, number=9)[0], batches(1, 10, number=3)
    adapter = foa(discrepancy=0.4)
    with torch.no_grad():
        seen = []
        for images in (source, x):
            tokens, layers = model.embed(torch.from_numpy(images)), []
            for k, block in enumerate(model.blocks):
                tokens = block(tokens)
                layers.append((model.blocks[k + 1].norm1 if k + 1 < len(model.blocks) else model.norm)(tokens[:, 0]))
            seen.append((torch.cat(layers, 1), model.head(layers[-1])))
        (clean, _), (test, logits) = seen
        uncertainty = torch.distributions.Categorical(logits=logits).entropy().sum()
        distance = (test.mean(0) - clean.mean(0)).square().sum() + (test.std(0) - clean.std(0)).square().sum()
    expected = float(uncertainty + 0.4 * 10 / 64 * distance)
    assert adapter.fitness(adapter.predictor(x)) == pytest.approx(expected, rel=1e-4)
    assert foa(discrepancy=0.0).fitness(adapter.predictor(x)) == pytest.approx(float(uncertainty), rel=1e-4)


def test_without_discrepancy_an_indifferent_head_leaves_nothing_to_choose_by():
    model = vit()
    model.head.weight.data.zero_()
    model.head.bias.data.zero_()
    adapter, (x,) = foa(model, discrepancy=0.0, prompts=2), batches(1)
    points = adapter._evolution.ask()
    values = [adapter.fitness(adapter.predictor(x, prompts=adapter._tokens(point))) for point in points]
    np.testing.assert_allclose(values, len(x) * math.log(len(CLASSES)))


def test_the_answer_is_the_best_of_the_generation_and_never_worse_than_the_carried_prompt():
    adapter = foa(prompts=2, population=8, shift=0.0)
    carried = np.zeros((2, 16), np.float32)
    fitnesses = []
    for x in batches(6):
        points = [adapter._tokens(point) for point in adapter._evolution.ask()] + [carried]
        tried = [adapter.predictor(x, prompts=point) for point in points]
        values = [adapter.fitness(prediction) for prediction in tried]
        best = int(np.argmin(values))
        assert np.array_equal(adapter.predict(x), tried[best].logits)
        assert adapter.metrics()["fitness"] == values[best] <= adapter.metrics()["carried-fitness"] == values[-1]
        carried = points[best]
        fitnesses.append(values[best])
    assert adapter.metrics()["sigma"] > 0


def test_the_shift_goes_from_the_running_mean_to_the_sources():
    stream = batches(4)
    model, adapter = vit(), foa(prompts=0)
    source = adapter.predictor(batches(1, 32, number=9)[0]).features.mean(0)
    running = None
    for x in stream:
        features = adapter.predictor(x).features
        shift = np.zeros(16, np.float32) if running is None else source - running
        with torch.no_grad():
            expected = model.head(torch.from_numpy(features + shift))
        torch.testing.assert_close(torch.from_numpy(adapter.predict(x)), expected, rtol=1e-3, atol=1e-4)
        mean = features.mean(0)
        running = mean if running is None else 0.9 * running + 0.1 * mean


def test_where_the_stream_is_the_source_there_is_no_shift():
    x = batches(1, 32, number=9)[0]
    adapter = foa(prompts=0)
    for _ in range(3):
        np.testing.assert_allclose(adapter.predict(x), adapter.predictor(x).logits, rtol=1e-3, atol=1e-4)


def test_foa_wants_clean_examples_first_and_again_after_new_weights():
    adapter, (x,) = adapters.create("foa", predictor(vit())), batches(1)
    for _ in range(2):
        assert adapter.needs_source
        with pytest.raises(DataError, match="clean examples") as caught:
            adapter.predict(x)
        assert caught.value.code == "adapter-source"
        with pytest.raises(DataError, match="at least 2"):
            adapter.prepare(x[:1])
        adapter.prepare(x)
        assert not adapter.needs_source
        adapter.predict(x)
        adapter.weights_changed()
    assert set(adapter.state()) == set(adapters.create("foa", predictor(vit())).state())


def test_a_bad_batch_leaves_foa_where_it_was():
    adapter, other, stream = foa(prompts=2, population=5), foa(prompts=2, population=5), batches(3)
    for number, x in enumerate(stream):
        if number == 1:
            for bad in (x[:, :, :-1], x[:0], x * np.nan):
                with pytest.raises(TrellisError):
                    adapter.predict(bad)
        assert np.array_equal(adapter.predict(x), other.predict(x))


def test_source_statistics_of_another_model_are_refused():
    adapter, (x,) = foa(prompts=2), batches(1)
    state = adapter.state()
    with pytest.raises(DataError, match="no multiple of the width"):
        adapter.load_state({**state, "source.mean": state["source.mean"][:-1], "source.std": state["source.std"][:-1]})
    adapter.load_state({**state, "source.mean": state["source.mean"][:16], "source.std": state["source.std"][:16]})
    with pytest.raises(DataError, match="another model's") as caught:
        adapter.predict(x)
    assert caught.value.code == "adapter-state"


def test_the_search_reaches_the_bottom_of_a_sphere_and_a_saved_one_takes_the_same_way():
    def restart(state):
        other = Evolution(10, 1.0, None, 3)
        reader = Reader("foa", state)
        other.load_state(reader)
        reader.done()
        return other

    straight, restarted = Evolution(10, 1.0, None, 3), Evolution(10, 1.0, None, 3)
    centre = np.linspace(-1, 2, 10)
    carried, values = np.zeros(10), [math.inf]
    for _ in range(180):
        points, again = [*straight.ask(), carried], [*restarted.ask(), carried]
        assert all(np.array_equal(a, b) for a, b in zip(points, again, strict=True))
        values = [float(((point - centre) ** 2).sum()) for point in points]
        straight.tell(points, values)
        restarted.tell(again, values)
        restarted = restart(restarted.state())
        carried = points[int(np.argmin(values))]
    assert min(values) < 1e-8
    assert Evolution(10, 1.0, None, 4).ask()[0][0] != Evolution(10, 1.0, None, 3).ask()[0][0]


def test_a_search_that_collapsed_starts_anew_where_it_stood():
    search = Evolution(6, 0.5, None, 0)
    for _ in range(400):
        points = search.ask()
        search.tell(points, [float(((point - 1) ** 2).sum()) for point in points])
        assert 0.5 / 1e6 < search.step < 0.5 * 1e6
    assert search.generation == 400
    np.testing.assert_allclose(search.mean, 1, atol=2)
