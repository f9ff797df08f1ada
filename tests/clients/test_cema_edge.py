"""The edge side of CEMA and its baselines: thresholds, budget, statistics, selections, steps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trellis.data.base import Batch
from trellis.errors import DataError
from trellis.models import adaptation
from trellis_clients import batchnorm, client_state
from trellis_clients.contract import site_of
from trellis_clients.trainer import Turn
from trellis_clients.trainers.cloud_edge import _edge
from trellis_clients.trainers.cloud_edge._selection import Budget, Thresholds

SCENARIO = """\
name: edge
data: {name: digits}
clients: 2
partition: {name: iid, test_fraction: 0.5}
model: {name: small-cnn, width: 4, hidden: 16, norm: batch}
trainer: {name: TRAINER, stream: {severity: 3.0, segment: 2, batch_size: 16}}
strategy: {name: cema, batches: 2}
runtime: {grid: local}
"""
TRAINERS = ("cema", "tta-source", "tta-bn", "tent", "eata")


def site(folder, trainer: str = "cema", *overrides: str):
    path = folder / "edge.yaml"
    path.write_text(SCENARIO.replace("TRAINER", trainer))
    return site_of(path, overrides)


def turn(here, number: int = 1, batches: int = 2, source: bool = True) -> Turn:
    arrays = {name: values.detach().clone() for name, values in here.trainer.shared(here.model).items()}
    received = {"arrays": arrays}
    if source:
        received["source"] = {name: values.clone() for name, values in here.model.state_dict().items()}
    return Turn(number, 10, 0, 2, torch.Generator(), {"batches": batches}, received)


def go(here, state, number: int = 1, batches: int = 2):
    """Let client 0 go on with its stream; returns the metrics and the turn."""
    each = turn(here, number, batches)
    return here.trainer.answer("stream", here.model, here.federation.client(0), state, each), each


# -- thresholds and budget --------------------------------------------------------------------------------


def test_the_first_batch_is_judged_by_the_papers_thresholds():
    c10 = Thresholds(10, 0.4, 0.02, 1.0)
    low, high = 0.02 * math.log(10), 0.4 * math.log(10)
    assert high == pytest.approx(0.921, abs=1e-3)
    entropies = torch.tensor([0.0, low - 1e-4, low + 1e-4, high - 1e-4, high + 1e-4, math.log(10)])
    assert c10.keep(entropies).tolist() == [False, False, True, True, False, False]
    c1000 = Thresholds(1000, 0.4, 0.02, 1.0)
    c1000.keep(entropies)
    assert c1000.e_max == pytest.approx(2.763, abs=1e-3)


def test_the_recursion_with_lambda_one_telescopes():
    thresholds, draws = Thresholds(10, 0.4, 0.02, 1.0), torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    for t, entropies in enumerate(draws):
        thresholds.keep(entropies)
        first, mean = draws[0].double().mean(), draws[: t + 1].double().mean()
        assert thresholds.e_max == pytest.approx(0.4 * math.log(10) * float(mean / first), rel=1e-6)


def test_constant_entropies_keep_the_threshold_and_lambda_compounds():
    steady, falling = Thresholds(10, 0.4, 0.02, 1.0), Thresholds(10, 0.4, 0.02, 0.5)
    for _ in range(4):
        steady.keep(torch.full((8,), 0.3))
        falling.keep(torch.full((8,), 0.3))
    assert steady.e_max == pytest.approx(0.4 * math.log(10))
    assert falling.e_max == pytest.approx(0.4 * math.log(10) * 0.5**3)


def test_a_saved_threshold_goes_on():
    draws = torch.rand(4, 8, generator=torch.Generator().manual_seed(1))
    straight, restored = Thresholds(10, 0.4, 0.02, 0.9), Thresholds(10, 0.4, 0.02, 0.9)
    for entropies in draws[:2]:
        straight.keep(entropies)
    restored.load_state(straight.state())
    for entropies in draws[2:]:
        assert torch.equal(straight.keep(entropies), restored.keep(entropies))
    assert straight.e_max == restored.e_max


def test_certain_answers_alone_do_not_divide_by_zero():
    thresholds = Thresholds(10, 0.4, 0.02, 1.0)
    thresholds.keep(torch.zeros(4))
    thresholds.keep(torch.tensor([0.5]))
    assert math.isfinite(thresholds.e_max)


def test_the_budget_is_never_exceeded_and_takes_the_surest_first():
    budget, spent = Budget(bytes_per_hour=3600.0), 0
    entropies = torch.tensor([0.9, 0.1, 0.5, 0.3])
    for batch in range(1, 50):
        chosen = budget.afford(torch.arange(4), entropies, sample_bytes=100, hours=0.05)
        spent += 100 * len(chosen)
        assert spent <= 3600 * 0.05 * batch
        if len(chosen) == 2:
            assert chosen.tolist() == [1, 3]
    assert spent > 0.9 * 3600 * 0.05 * 49
    assert Budget(None).afford(torch.arange(4), entropies, 100, 0.0).tolist() == [0, 1, 2, 3]


def test_savings_end_at_one_hour():
    budget = Budget(1000.0)
    budget.afford(torch.arange(0), torch.empty(0), 100, hours=50.0)
    assert len(budget.afford(torch.arange(99), torch.rand(99), 100, hours=0.0)) == 10


# -- the devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINERS)
def test_a_stream_in_two_turns_is_the_stream_in_one(tmp_path, name):
    """All that a device keeps is in its state; what else the worker did in between does not matter."""
    here, whole, parts = site(tmp_path, name), {}, {}
    start = {key: values.clone() for key, values in here.model.state_dict().items()}
    once, long = go(here, whole, batches=4)
    uploads, right = [], 0
    for number in (1, 2):
        here.model.load_state_dict(start)
        metrics, each = go(here, parts, number)
        parts = client_state.unpack(client_state.pack(parts))
        uploads.append(each.reply["uploads"]["images"])
        right += metrics["right"]
    assert once["right"] == right and once["seen"] == 64
    assert torch.equal(torch.cat(uploads), long.reply["uploads"]["images"])
    assert parts["position"] == whole["position"] == 4


def test_uploads_are_what_the_thresholds_keep_as_pixels(tmp_path):
    here, state = site(tmp_path, "cema", "trainer.upload=float32", "trainer.statistics=source", "trainer.e_min=0.9"), {}
    start = {key: values.clone() for key, values in here.model.state_dict().items()}
    here.trainer.config = here.trainer.config.model_copy(update={"e_max": 0.9999})  # an untrained model is unsure
    metrics, each = go(here, state)
    model = here.model
    model.load_state_dict(start)
    stream, thresholds = here.trainer.stream(here.federation.client(0)), Thresholds(10, 0.9999, 0.9, 1.0)
    expected = []
    for position in range(2):
        x, _ = stream.batch(position)
        with torch.no_grad():
            expected.append(stream.to_pixels(x[thresholds.keep(adaptation.entropy(model.eval()(x)))]))
    sent = each.reply["uploads"]["images"]
    torch.testing.assert_close(sent, torch.cat(expected))
    assert 0 < len(sent) == metrics["uploaded"]
    assert sent.min() >= 0 and sent.max() <= 1
    assert metrics["upload-bytes"] == sent.numel() * 4


def test_without_filter_all_is_uploaded_and_with_e_max_zero_nothing(tmp_path):
    metrics, each = go(site(tmp_path, "cema", "trainer.filter=false"), {})
    assert metrics["uploaded"] == metrics["seen"] == 32
    assert each.reply["uploads"]["images"].dtype == torch.uint8
    metrics, each = go(site(tmp_path, "cema", "trainer.e_max=0.0"), {})
    assert metrics["uploaded"] == 0
    assert each.reply["uploads"]["images"].shape == (0, 1, 8, 8)


def test_the_device_takes_no_gradient(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.Tensor, "backward", fail)
    monkeypatch.setattr(torch.autograd, "grad", fail)
    metrics, _ = go(site(tmp_path), {})
    assert (metrics["forwards"], metrics["backwards"]) == (32, 0)


def test_a_budget_bounds_what_is_sent(tmp_path):
    # A batch of 16 takes 1.6 s of stream time: 64 bytes, one picture, per 0.8 s at 288000 bytes an hour.
    metrics, _ = go(site(tmp_path, "cema", "trainer.filter=false", "trainer.budget_bytes_per_hour=288000.0"), {})
    assert metrics["uploaded"] == 4


def test_only_affine_parameters_cross_the_wire(tmp_path):
    here = site(tmp_path)
    shared = here.trainer.shared(here.model)
    layers = batchnorm.layers(here.model)
    assert sum(v.numel() for v in shared.values()) == 2 * sum(layer.num_features for _, layer in layers)
    assert [name for name, p in here.model.named_parameters() if p.requires_grad] == list(shared)
    cloud = site(tmp_path, "cema", "trainer.statistics=cloud")
    assert sum(v.numel() for v in cloud.trainer.shared(cloud.model).values()) == 2 * sum(
        v.numel() for v in shared.values()
    )


def test_a_device_that_never_got_the_source_says_so(tmp_path):
    here = site(tmp_path)
    with pytest.raises(DataError, match="never sent"):
        here.trainer.answer("stream", here.model, here.federation.client(0), {}, turn(here, source=False))


def test_a_model_without_normalisation_is_refused(tmp_path):
    with pytest.raises(DataError, match="no normalisation layers"):
        site(tmp_path, "cema", "model.norm=none")


def test_prediction_time_batch_norm_is_the_layer_in_training_mode(tmp_path):
    here = site(tmp_path, "tta-bn")
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    (logits,) = here.trainer.adapt(here.model, [Batch({"x": x}, torch.arange(16))], {}, turn(here))
    source = site(tmp_path, "tta-source")
    (plain,) = source.trainer.adapt(source.model, [Batch({"x": x}, torch.arange(16))], {}, turn(source))
    assert not torch.allclose(plain, logits, atol=1e-3)
    torch.testing.assert_close(logits, source.model.train()(x), rtol=1e-4, atol=1e-5)


def test_a_prior_of_as_many_images_is_the_midpoint_of_the_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    layer = model[0]
    x = torch.randn(8, 3, 4, 4) * 2 + 1
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    with torch.no_grad(), _edge.moving_statistics(model, 8 / (8 + 8)):
        out = model(x)
    expected = F.batch_norm(x, mean / 2, (var + 1) / 2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert not layer._forward_pre_hooks


# -- Tent and EATA ----------------------------------------------------------------------------------------


def test_tent_takes_the_step_of_a_plain_loop(tmp_path):
    here, state = site(tmp_path, "tent"), {}
    start = {key: values.clone() for key, values in here.model.state_dict().items()}
    metrics, _ = go(here, state)
    other = site(tmp_path, "tent")
    other.model.load_state_dict(start)
    own = adaptation.affine(other.model)
    optimizer = torch.optim.SGD(own.values(), lr=0.005, momentum=0.9)
    stream = other.trainer.stream(other.federation.client(0))
    for position in range(2):
        with batchnorm.batch_statistics(other.model.eval()):
            log = other.model(stream.batch(position)[0]).log_softmax(1)
        optimizer.zero_grad()
        (-(log.exp() * log).sum(1).mean()).backward()
        optimizer.step()
    assert metrics["backwards"] == 32
    for name, values in own.items():
        assert torch.equal(values, state["affine"][name])
        assert not torch.equal(values, start[name])


def test_eata_without_filters_weights_and_penalty_keeps_all_and_steps(tmp_path):
    here = site(tmp_path, "eata", "trainer.max_cosine=2.0", "trainer.fisher_weight=0.0", "trainer.e_max=1.01")
    logits = torch.randn(16, 10, requires_grad=True)
    loss, used = here.trainer.objective(here.model, logits, {})
    assert used == 16
    (gradient,) = torch.autograd.grad(loss, logits)
    entropies = adaptation.entropy(logits)
    weights = (1.01 * math.log(10) - entropies.detach()).exp()
    (expected,) = torch.autograd.grad((weights * entropies).mean(), logits)
    torch.testing.assert_close(gradient, expected)


def test_eata_keeps_reliable_and_new_samples_only(tmp_path):
    here, state = site(tmp_path, "eata", "trainer.fisher_weight=0.0"), {}
    uniform = torch.zeros(8, 10)
    assert here.trainer.objective(here.model, uniform, state) == (None, 0)
    assert state == {}
    sure = torch.eye(10)[:4] * 8
    _, used = here.trainer.objective(here.model, sure[:1].requires_grad_(), state)
    assert used == 1
    assert float(state["mean"].sum()) == pytest.approx(1)
    _, used = here.trainer.objective(here.model, sure.clone().requires_grad_(), state)
    assert used == 3  # the one like the mean is redundant


def test_eata_penalty_is_zero_at_the_source_and_pulls_back(tmp_path):
    here, state = site(tmp_path, "eata"), {}
    here.trainer.prepare(here.model, here.federation.client(0), state, turn(here))
    assert all((v >= 0).all() for v in state["fisher"].values())
    assert any(v.any() for v in state["fisher"].values())
    logits = torch.randn(8, 10) * 5
    own = adaptation.affine(here.model)
    at_source, _ = here.trainer.objective(here.model, logits, dict(state))
    with torch.no_grad():
        for values in own.values():
            values += 0.5
    moved, _ = here.trainer.objective(here.model, logits, dict(state))
    penalty = sum(float((f * 0.25).sum()) for f in state["fisher"].values())
    assert float((moved - at_source).detach()) == pytest.approx(penalty, rel=1e-4)


def test_entropy_of_uniform_logits_is_ln_c_and_falls_with_confidence():
    assert float(adaptation.entropy(torch.zeros(1, 1000))) == pytest.approx(math.log(1000), rel=1e-6)
    values = [float(adaptation.entropy(torch.tensor([[scale, 0.0, 0.0]]))) for scale in (0, 1, 2, 4, 8)]
    assert all(a > b for a, b in pairwise(values))
