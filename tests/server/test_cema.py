"""The cloud side of CEMA: losses, batch renormalisation, adaptation, the strategy's messages, gate and state."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from trellis import flower, records, scenario
from trellis.data.base import Split
from trellis.errors import DataError
from trellis.grids.local import LocalGrid
from trellis.models import adaptation, pretraining
from trellis_clients.contract import site_of
from trellis_server import strategy_state
from trellis_server.cloud_adaptation import CloudAdaptation, Settings
from trellis_server.distillation import Renormalised, Weights, confidence, distillation_loss, entropy_loss
from trellis_server.strategies import build_strategy

E_MAX = 0.4 * math.log(10)


def logits(seed: int = 0, count: int = 12) -> torch.Tensor:
    return torch.randn(count, 10, generator=torch.Generator().manual_seed(seed)) * 2


# -- losses -----------------------------------------------------------------------------------------------


def test_weights_are_constants_to_the_gradient():
    student = logits().requires_grad_()
    (gradient,) = torch.autograd.grad(entropy_loss(student, E_MAX), student)
    fixed = (E_MAX - adaptation.entropy(student.detach())).exp()
    (expected,) = torch.autograd.grad((fixed * adaptation.entropy(student)).mean(), student)
    torch.testing.assert_close(gradient, expected)
    assert (confidence(student, E_MAX) <= math.exp(E_MAX)).all()


def test_a_student_like_its_teacher_has_no_divergence():
    student = logits().requires_grad_()
    loss = distillation_loss(student, student.detach().clone(), E_MAX, Weights(0, 3, 0), temperature=2.0)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.abs().max() < 1e-6


def test_the_loss_is_the_sum_of_its_three_terms():
    student, teacher = logits(), logits(1)
    trust = confidence(teacher, E_MAX)
    p, q = teacher.softmax(1), student.softmax(1)
    kl = (trust * (p * (p / q).log()).sum(1)).mean()
    ce = (trust * F.cross_entropy(student, teacher.argmax(1), reduction="none")).mean()
    expected = 3 * entropy_loss(student, E_MAX) + 3 * kl + ce
    torch.testing.assert_close(distillation_loss(student, teacher, E_MAX, Weights()), expected, rtol=1e-5, atol=1e-5)


def test_the_teacher_gets_no_gradient():
    teacher = logits(1).requires_grad_()
    loss = distillation_loss(logits().requires_grad_(), teacher, E_MAX, Weights())
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


# -- batch renormalisation --------------------------------------------------------------------------------


def test_renormalisation_has_the_running_statistics_value_and_the_batchs_gradient():
    layer = nn.BatchNorm2d(3)
    with torch.no_grad():
        layer.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        layer.running_var.copy_(torch.tensor([0.5, 2.0, 1.0]))
        layer.weight.copy_(torch.tensor([1.5, 0.5, 2.0]))
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    run = Renormalised(nn.Sequential(layer))
    run.started = True
    x = (torch.randn(8, 3, 4, 4) * 3 + 1).requires_grad_()
    out = run(x, adapting=True)
    plain = F.batch_norm(x, mean, var, layer.weight, layer.bias)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(out)
    (through_batch,) = torch.autograd.grad((out * direction).sum(), x, retain_graph=True)
    (through_running,) = torch.autograd.grad((plain * direction).sum(), x)
    assert not torch.allclose(through_batch, through_running, atol=1e-3)
    # The formula, written out.
    batch_var, batch_mean = torch.var_mean(x, (0, 2, 3), keepdim=True)
    std, running = (batch_var + layer.eps).sqrt(), (var.view(1, -1, 1, 1) + layer.eps).sqrt()
    r, d = std.detach() / running, (batch_mean.detach() - mean.view(1, -1, 1, 1)) / running
    (expected,) = torch.autograd.grad(
        ((((x - batch_mean) / std * r + d) * layer.weight.view(1, -1, 1, 1)) * direction).sum(), x
    )
    torch.testing.assert_close(through_batch, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.running_mean, mean.lerp(batch_mean.detach().flatten(), 0.1))
    torch.testing.assert_close(layer.running_var, var.lerp(batch_var.detach().flatten(), 0.1))


def test_inference_moves_nothing_and_the_first_batch_replaces_the_statistics():
    layer = nn.BatchNorm2d(2)
    run = Renormalised(nn.Sequential(layer))
    x = torch.randn(8, 2, 4, 4) + 3
    run(x, adapting=False)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))
    kept = layer.running_mean.clone()
    assert not run(x * 2, adapting=False).requires_grad
    assert torch.equal(layer.running_mean, kept)


def test_statistics_that_do_not_follow_stay_for_good():
    layer = nn.BatchNorm2d(2)
    run = Renormalised(nn.Sequential(layer), follow=False)
    x = torch.randn(8, 2, 4, 4) + 3
    out = run(x, adapting=True)
    assert out.requires_grad
    torch.testing.assert_close(out, x / math.sqrt(1 + layer.eps))
    assert not layer.running_mean.any() and (layer.running_var == 1).all()


# -- adaptation -------------------------------------------------------------------------------------------


def net(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.LayerNorm(width * 36),
        nn.Linear(width * 36, 10),
    )  # fmt: skip


def cloud(**changes) -> CloudAdaptation:
    settings = Settings(
        e_max=E_MAX,
        upload_batch=8,
        replay_batch=8,
        replay_size=40,
        replay_least=16,
        foundation_lr=0.01,
        edge_lr=0.01,
        momentum=0.9,
        weights=Weights(),
        temperature=1.0,
        distil=True,
        follow=True,
        max_grad_norm=None,
    )
    torch.manual_seed(0)
    edge, foundation = net(2), net(4)
    return CloudAdaptation(lambda: foundation, edge, replace(settings, **changes), 0, torch.device("cpu"))


def images(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_only_normalisation_changes_in_both_models():
    each = cloud()
    before = {k: v.clone() for k, v in each.foundation.model.state_dict().items()}
    for seed in range(4):
        each.adapt({0: images(seed, 12)})
    pairs = [(before, each.foundation.model), (each.source.state_dict(), each.copy(0).model)]
    for start, model in pairs:
        moved = {name for name, values in model.state_dict().items() if not torch.equal(values, start[name])}
        assert moved == {f"1.{x}" for x in ("weight", "bias", "running_mean", "running_var")} | {"4.weight", "4.bias"}


def test_steps_follow_full_batches_and_the_rest_waits():
    each = cloud()
    assert each.adapt({0: images(0, 7)}).steps == 0
    assert len(each.copy(0).waiting) == 7
    report = each.adapt({0: images(1, 10)})
    assert (report.steps, len(each.copy(0).waiting)) == (2, 1)
    assert report.samples == 2 * (8 + 8)  # seventeen uploads are enough to replay


def test_replay_keeps_the_newest_and_is_used_when_too_few_come():
    each = cloud(replay_size=20)
    each.adapt({0: images(0, 16)})
    each.adapt({0: images(1, 16)})
    torch.testing.assert_close(torch.stack(each.replay[-16:]), images(1, 16))
    assert len(each.replay) == 20
    report = each.adapt({0: images(2, 0)})
    assert (report.steps, report.samples, report.foundation_loss) == (1, 16, 0.0)
    assert cloud(replay_size=0).adapt({0: images(0, 16)}).samples == 16


def test_one_step_is_the_papers_step():
    """Entropy step of the foundation model, its logits anew at rest, then the distillation step."""
    each = cloud(replay_batch=0)
    foundation, edge = copy.deepcopy(each.foundation.model), copy.deepcopy(each.source)
    x = images(3, 8)
    each.adapt({0: x})
    for model in (foundation, edge):
        adaptation.train_only_affine(model)
        for module in model.modules():  # copied hooks would act on the original
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
    teacher, student = Renormalised(foundation), Renormalised(edge)
    first = torch.optim.SGD(adaptation.affine(foundation).values(), lr=0.01, momentum=0.9)
    entropy_loss(teacher(x, adapting=True), E_MAX).backward()
    first.step()
    target = teacher(x, adapting=False)
    second = torch.optim.SGD(adaptation.affine(edge).values(), lr=0.01, momentum=0.9)
    distillation_loss(student(x, adapting=True), target, E_MAX, Weights()).backward()
    second.step()
    for name, values in edge.state_dict().items():
        torch.testing.assert_close(each.copy(0).model.state_dict()[name], values, msg=name)


def test_without_distillation_no_foundation_model_is_made():
    each = cloud(distil=False)
    each.make_foundation = lambda: pytest.fail("a foundation model was made")
    assert each.adapt({0: images(0, 16)}).steps == 2
    assert each.state()["foundation"] is None


def test_separate_copies_share_teacher_and_replay_only():
    each = cloud()
    each.adapt({1: images(0, 8), 2: images(1, 8)})
    a, b = (each.copy(n).affine["1.weight"] for n in (1, 2))
    assert not torch.equal(a, b)
    assert len(each.replay) == 16


def test_a_restored_state_goes_on_to_the_same_bits():
    straight, restored = cloud(), cloud()
    for seed in range(3):
        straight.adapt({0: images(seed, 11), 1: images(seed + 9, 5)})
    restored.load_state(copy.deepcopy(straight.state()))
    for each in (straight, restored):
        each.adapt({0: images(7, 13), 1: images(8, 13)})
    for number in (0, 1):
        ours, theirs = straight.copy(number).tensors(), restored.copy(number).tensors()
        assert all(torch.equal(values, theirs[name]) for name, values in ours.items())
    for name, values in straight.foundation.tensors().items():
        assert torch.equal(values, restored.foundation.tensors()[name])


# -- clean training ---------------------------------------------------------------------------------------


def test_clean_training_learns_and_repeats():
    x, y = images(0, 64), torch.arange(64) % 10
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(net(4))
        pretraining.train(models[-1], Split.whole(x=x, y=y), epochs=30, lr=0.01, batch_size=16, seed=3, name="source")
    a, b = (model.state_dict() for model in models)
    assert all(torch.equal(values, b[name]) for name, values in a.items())
    assert (models[0](x).argmax(1) == y).float().mean() > 0.9
    assert not models[0].training


def test_weights_from_a_file_must_exist_fit_and_be_safetensors(tmp_path):
    model = net(2)
    save_file(model.state_dict(), tmp_path / "good.safetensors")
    other = net(2)
    pretraining.read(other, tmp_path / "good.safetensors", "strategy.source_weights")
    assert torch.equal(other[0].weight, model[0].weight)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for name, fresh, code in (
        ("none", net(2), "weights-missing"),
        ("bad", net(2), "weights-damaged"),
        ("good", net(3), "weights-shape"),
    ):
        with pytest.raises(DataError, match=r"strategy\.source_weights") as caught:
            pretraining.read(fresh, tmp_path / f"{name}.safetensors", "strategy.source_weights")
        assert caught.value.code == code


# -- the strategy -----------------------------------------------------------------------------------------

SCENARIO = """\
name: cema
data: digits
clients: 3
partition: {name: iid, test_fraction: 0.5}
model: {name: small-cnn, width: 4, hidden: 16, norm: batch}
trainer: {name: cema, upload: float32, stream: {batch_size: 16}}
strategy: {name: cema, batches: 2, epochs: 1, foundation: {name: small-cnn, width: 8, norm: batch}}
runtime: {grid: local}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("cema") / "cema.yaml"
    path.write_text(SCENARIO)
    return site_of(path)


def attached(site, **changes):
    params = {**site.scenario.strategy.params, **changes}
    each = scenario.from_mapping({**scenario.plain(site.scenario), "strategy": {"name": "cema", **params}})
    strategy = build_strategy(each, 3, 0)
    return strategy, strategy.attach(SimpleNamespace(site=site))


def ask(strategy, arrays, number: int = 1) -> list[Message]:
    config = ConfigRecord({"num-rounds": 3})
    return flower.number(strategy.configure_train(number, arrays, config, LocalGrid(ClientApp(), 3)))


def upload(to: Message, images: np.ndarray, **metrics) -> Message:
    counts = {"num-examples": 32, "seen": 32, "right": 16, "uploaded": len(images), "upload-bytes": images.nbytes}
    values = {**counts, "forwards": 32, "backwards": 0, "accuracy": 0.5, "entropy": 0.4, "e-max": 0.9, **metrics}
    content = RecordDict({"uploads": records.array_record({"images": images}), "metrics": MetricRecord(values)})
    return flower.reply(content, to)


def pixels(count: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 1, 8, 8), dtype=np.float32)


def test_the_source_goes_to_each_edge_once_and_affine_parameters_every_time(site):
    strategy, arrays = attached(site)
    first = ask(strategy, arrays)
    assert {m.metadata.message_type for m in first} == {"train.stream"}
    assert all(set(m.content["source"]) == set(site.model.state_dict()) for m in first)
    strategy.aggregate_train(1, [upload(m, pixels()) for m in first[:2]])
    second = {m.metadata.dst_node_id: m for m in ask(strategy, arrays, 2)}
    assert [("source" in second[m.metadata.dst_node_id].content) for m in first] == [False, False, True]
    norms = [layer for layer in site.model.modules() if isinstance(layer, nn.BatchNorm2d)]
    sent = second[first[0].metadata.dst_node_id].content["arrays"]
    assert sum(records.view(a).size for a in sent.values()) == 2 * sum(layer.num_features for layer in norms)


def test_an_edge_that_failed_is_sent_the_source_again(site):
    strategy, arrays = attached(site)
    first = ask(strategy, arrays)
    strategy.aggregate_train(1, [upload(m, pixels()) for m in first])
    strategy.aggregate_train(2, [upload(m, pixels()) for m in ask(strategy, arrays, 2)[1:]])
    assert [len([name for name in m.content if name == "source"]) for m in ask(strategy, arrays, 3)].count(1) == 1


def test_uploads_change_the_affine_parameters_and_are_counted(site):
    strategy, arrays = attached(site)
    moved, metrics = strategy.aggregate_train(
        1, [upload(m, pixels(seed=k)) for k, m in enumerate(ask(strategy, arrays))]
    )
    assert records.digest(moved) != records.digest(arrays)
    assert metrics["uploaded"] == 60 and metrics["seen"] == 96
    assert metrics["accuracy"] == metrics["round-accuracy"] == 0.5
    assert metrics["cloud-steps"] == 3


def test_no_uploads_leave_the_source_as_it_is(site):
    strategy, arrays = attached(site)
    same, metrics = strategy.aggregate_train(1, [upload(m, pixels(0)) for m in ask(strategy, arrays)])
    assert records.digest(same) == records.digest(arrays)
    assert metrics["cloud-steps"] == 0


def test_separate_copies_send_each_edge_its_own(site):
    strategy, arrays = attached(site, copies="separate")
    first = ask(strategy, arrays)
    mean, _ = strategy.aggregate_train(1, [upload(m, pixels(seed=k)) for k, m in enumerate(first)])
    sent = [m.content["arrays"] for m in ask(strategy, mean, 2)]
    assert len({records.digest(each) for each in sent}) == 3
    for name, values in mean.items():
        expected = np.mean([records.view(each[name]) for each in sent], axis=0)
        np.testing.assert_allclose(records.view(values), expected, rtol=1e-5, atol=1e-7)


HOSTILE = {
    "too many": (lambda: pixels(33), {}, "33 images; the stream had 32"),
    "beyond one": (lambda: pixels() + 0.5, {}, "allowed is 0 to 1"),
    "below zero": (lambda: pixels() - 0.5, {}, "allowed is 0 to 1"),
    "fewer than said": (lambda: pixels(5), {"uploaded": 6}, "do not agree"),
    "more right than seen": (lambda: pixels(), {"right": 33}, "do not agree"),
    "more seen than streamed": (lambda: pixels(), {"seen": 3200, "right": 3200}, "do not agree"),
    "negative": (lambda: pixels(), {"forwards": -1}, "not a count"),
}


@pytest.mark.parametrize(("make", "metrics", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_uploads_are_refused_with_a_reason_and_counted(site, make, metrics, reason):
    strategy, arrays = attached(site)
    good, bad, _ = ask(strategy, arrays)
    assert strategy.problem_with(good, upload(good, pixels())) is None
    problem = strategy.problem_with(bad, upload(bad, make().astype(np.float32), **metrics))
    assert problem.startswith("upload: ") and reason in problem
    _, line = strategy.aggregate_train(1, [upload(good, pixels())])
    assert line["refused-uploads"] == 1


def test_the_gate_is_told_shape_and_dtype(site):
    strategy, arrays = attached(site)
    message = ask(strategy, arrays)[0]
    assert strategy.expected_reply(message) == {"uploads": {"images": ((None, 1, 8, 8), "float32")}}
    assert strategy.expected_reply(Message(message.content, 1000, "evaluate")) is None


def test_a_captured_strategy_goes_on_to_the_same_bits(site):
    straight, arrays = attached(site)
    arrays, _ = straight.aggregate_train(1, [upload(m, pixels(seed=k)) for k, m in enumerate(ask(straight, arrays))])
    tensors, values = strategy_state.capture(straight)
    restored = build_strategy(site.scenario, 3, 0)
    strategy_state.restore(restored, tensors, values)
    assert records.digest(restored.attach(SimpleNamespace(site=site))) == records.digest(arrays)
    results = []
    for strategy in (straight, restored):
        messages = ask(strategy, arrays, 2)
        assert all("source" not in m.content for m in messages)
        moved, metrics = strategy.aggregate_train(2, [upload(m, pixels(seed=9 + k)) for k, m in enumerate(messages)])
        results.append((records.digest(moved), dict(metrics)))
    assert results[0] == results[1]
