"""DINE: smoothing, losses, memory, schedule and the black box against their closed forms; what stays on a client."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from federations import lines, run, sha
from test_bits import resumed
from trellis import scenario
from trellis.data.base import Batch, ClientData, Split
from trellis.data.loading import load_data
from trellis.data.sets.shifted_digits import turned
from trellis.errors import PluginError, ScenarioError, TrellisError
from trellis.scenario import from_mapping
from trellis_clients import batchnorm, client_state
from trellis_clients.contract import site_of
from trellis_clients.site import KEPT
from trellis_clients.trainer import Turn
from trellis_clients.trainers.domain_adaptation import dine
from trellis_clients.trainers.domain_adaptation.dine import MEMORY, OPTIMIZER, STEP, STOPPED, information, smoothed

SCENARIO = """\
name: dine
data: {name: shifted-digits, size: 8, angles: [25.0, -25.0], source_fraction: 0.7}
partition: {name: natural-id, test_fraction: 0.3}
model: {name: small-cnn, width: 2, hidden: 16, norm: batch}
trainer: {name: dine, predictor_epochs: 4, bottleneck: 8}
rounds: {count: 4}
evaluation: {central_every: 0}
screening: {allow_unchanged: true, max_norm_ratio: 100}
probe: {every: 0, least: 0}
runtime: {grid: local}
"""


def site(folder: Path, *overrides: str):
    path = folder / "dine.yaml"
    path.write_text(SCENARIO)
    return site_of(path, overrides)


def turn_of(here, number: int = 1, rounds: int = 4) -> Turn:
    generator = torch.Generator().manual_seed(number)
    return Turn(number, rounds, 0, 2, generator, received={"arrays": here.trainer.shared(here.model)})


def fit(here, state, number: int = 1, rounds: int = 4, data: ClientData | None = None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        return here.trainer.fit(here.model, data or here.federation.client(0), state, turn_of(here, number, rounds))


def answers(n: int = 6, classes: int = 5) -> torch.Tensor:
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(0)).softmax(1)


# -- closed forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_smoothing_keeps_the_largest_and_spreads_the_rest(kept):
    q = answers()
    p = smoothed(q, kept)
    torch.testing.assert_close(p.sum(1), torch.ones(6))
    for given, made in zip(q, p, strict=True):
        top = given.topk(kept).indices
        assert torch.equal(made[top], given[top])
        rest = torch.tensor([c for c in range(5) if c not in top])
        torch.testing.assert_close(made[rest], ((1 - given[top].sum()) / (5 - kept)).expand(5 - kept))


def test_smoothing_where_nothing_can_change():
    q, one_hot, two = answers(), torch.eye(5), answers(4, 2)
    assert torch.equal(smoothed(q, 5), q)
    torch.testing.assert_close(smoothed(one_hot, 1), one_hot)
    torch.testing.assert_close(smoothed(two, 1), two)


def test_information_of_balanced_uniform_and_collapsed_answers():
    assert float(information(torch.eye(4))) == pytest.approx(-math.log(4), abs=1e-3)
    assert float(information(torch.full((8, 4), 0.25))) == pytest.approx(0, abs=1e-4)
    assert float(information(torch.eye(4)[:1].repeat(8, 1))) == pytest.approx(0, abs=1e-4)
    p = answers().double().numpy()
    entropy = -(p * np.log(p + 1e-5)).sum(1).mean() + (p.mean(0) * np.log(p.mean(0) + 1e-5)).sum()
    assert float(information(torch.from_numpy(p))) == pytest.approx(entropy, rel=1e-9)


def test_distilling_is_kl_from_the_memory_with_the_gradient_of_its_closed_form(tmp_path):
    trainer = site(tmp_path, "trainer.information_weight=0.0", "trainer.mix_weight=0.0").trainer
    logits, memory = torch.randn(6, 5, requires_grad=True), answers()
    batch = Batch({"x": logits, MEMORY: memory}, torch.arange(6))
    here = Turn(1, 4, 0, 2, torch.Generator())
    loss = trainer.loss(nn.Identity(), batch, here)
    s = logits.detach().softmax(1)
    torch.testing.assert_close(loss.detach(), (memory * (memory.log() - s.log())).sum(1).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, (s - memory) / 6)
    same = Batch({"x": logits, MEMORY: s}, torch.arange(6))
    assert float(trainer.loss(nn.Identity(), same, here).detach()) == pytest.approx(0, abs=1e-6)


def test_the_loss_is_the_sum_of_the_papers_two_backward_passes(tmp_path):
    here = site(tmp_path, "trainer.mix_weight=0.8", "trainer.information_weight=0.6")
    model, trainer = here.model.train(), here.trainer
    x = here.federation.client(0).train.batch(torch.arange(16)).x
    memory = answers(16, 10)
    twin, statistics = copy.deepcopy(model), None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        loss = trainer.loss(model, Batch({"x": x, MEMORY: memory}, torch.arange(16)), turn_of(here))
        loss.backward()
        torch.manual_seed(3)
        share = float(torch.distributions.Beta(0.3, 0.3).sample())
    order = torch.randperm(16, generator=turn_of(here).generator)
    s = twin(x).softmax(1)
    statistics = [
        values.clone() for _, layer in batchnorm.layers(twin) for values in (layer.running_mean, layer.running_var)
    ]
    first = (memory * (memory.log() - s.log())).sum(1).mean() + 0.6 * information(s)
    first.backward()
    target = (share * s + (1 - share) * s[order]).detach()
    mixed = twin(share * x + (1 - share) * x[order]).softmax(1)
    (0.8 * (target * (target.log() - mixed.log())).sum(1).mean()).backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    # Mixed images have left the running statistics alone.
    ours = [values for _, layer in batchnorm.layers(model) for values in (layer.running_mean, layer.running_var)]
    assert all(torch.equal(a, b) for a, b in zip(ours, statistics, strict=True))


def test_the_rate_ends_at_its_published_share():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "rate": 0.01}], lr=1.0)
    for progress, power, expected in ((0.0, 1.5, 0.01), (1.0, 1.5, 0.01 * 0.0274), (1.0, 0.75, 0.01 * 11**-0.75)):
        dine.slow_down(optimizer, progress, power)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-3)


def test_rates_of_all_steps_follow_both_phases(tmp_path, monkeypatch):
    """Steps count from one, so that a phase's last step has exactly its published share; tuning begins at the top."""
    here, state = (
        site(tmp_path, "trainer.lr=0.02", "trainer.distil=0.5", "trainer.trunk_rate=0.5", "trainer.local_epochs=4"),
        {},
    )
    rates = []

    class Spy(torch.optim.SGD):
        def step(self, *args, **kwargs):
            rates.append(tuple(group["lr"] for group in self.param_groups))
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    monkeypatch.setattr(dine.torch, "equal", lambda *_: False)  # never stops
    for number in (1, 2, 3, 4):
        fit(here, state, number)
    half = len(rates) // 2
    assert len(rates) == state[STEP] and len(rates) % 2 == 0 and half > 10
    for number in range(half):
        distil = (1 + 10 * (number + 1) / half) ** -1.5
        tune = (1 + 10 * (number + 1) / half) ** -0.75
        assert rates[number] == pytest.approx((0.01 * distil, 0.02 * distil))
        assert rates[half + number] == pytest.approx((0.002 * tune, 0.02 * tune))
    assert rates[half - 1] == pytest.approx((0.01 * 11**-1.5, 0.02 * 11**-1.5))
    assert rates[-1] == pytest.approx((0.002 * 11**-0.75, 0.02 * 11**-0.75))


# -- memory and phases ------------------------------------------------------------------------------------


def test_the_predictors_word_fades_by_powers(tmp_path, monkeypatch):
    """With a student whose answers never change, k refreshes leave 0.6^k of the first memory."""
    here, state = site(tmp_path, "trainer.distil=1.0", "trainer.local_epochs=5"), {}
    count = len(here.federation.client(0).train)
    constant = answers(1, 10).expand(count, -1)
    monkeypatch.setattr(here.trainer, "answers", lambda model, data: constant)
    asked = smoothed(here.trainer.ask(here.federation.client(0).train.batch(torch.arange(count)).x), 1)
    for number in range(1, 5):
        fit(here, state, number)
    k = 9  # a refresh every tenth of the phase, and none at its end
    torch.testing.assert_close(state[MEMORY], 0.6**k * asked + (1 - 0.6**k) * constant)


def test_every_image_is_asked_about_once_and_nothing_of_the_predictor_is_at_hand(tmp_path):
    here, state, seen = site(tmp_path), {}, []
    here.trainer.ask(here.federation.client(0).train.batch(torch.arange(1)).x)
    (predict,) = here.trainer.predictors
    here.trainer.predictors = [lambda images: (seen.append(images), predict(images))[1]]
    queries = [fit(here, state, number)["queries"] for number in (1, 2, 3)]
    train = here.federation.client(0).train
    assert queries == [len(train), 0, 0] and sum(map(len, seen)) == len(train)
    assert torch.equal(torch.cat(seen), train.batch(torch.arange(len(train))).x)
    assert not any(isinstance(value, nn.Module) for value in vars(here.trainer).values())
    out = predict(seen[0].clone().requires_grad_())
    assert not out.requires_grad
    torch.testing.assert_close(out.sum(1), torch.ones(len(out)))


def test_several_predictors_answer_by_their_mean(tmp_path):
    here = site(tmp_path, "data.source_angles=[0.0, 20.0]")
    x = here.federation.client(0).train.batch(torch.arange(9)).x
    found = here.trainer.ask(x)
    first, second = (predict(x) for predict in here.trainer.predictors)
    torch.testing.assert_close(found, (first + second) / 2)
    assert not torch.allclose(first, second)


def test_labels_of_the_target_are_never_read(tmp_path):
    weights = []
    for wrong in (False, True):
        here, state = site(tmp_path), {}
        data = here.federation.client(0)
        fields = dict(data.train.fields)
        if wrong:
            fields["y"] = torch.full_like(fields["y"], 10**6)
        given = ClientData(0, Split(fields, data.train.rows), data.test, data.splits)
        for number in (1, 4):
            fit(here, state, number, data=given)
        weights.append({name: values.clone() for name, values in here.model.state_dict().items()})
    assert all(torch.equal(values, weights[1][name]) for name, values in weights[0].items())


def test_tuning_starts_from_a_fresh_optimizer_and_distilling_goes_on_with_its_own(tmp_path, monkeypatch):
    """The momentum before a turn's first step: what the turn before left, and none where tuning begins."""
    here, state = site(tmp_path, "trainer.distil=0.5"), {}
    found = []

    class Spy(torch.optim.SGD):
        def step(self, *args, **kwargs):
            found.append([self.state[p].get("momentum_buffer") for group in self.param_groups for p in group["params"]])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    left, steps = [], []
    for number in (1, 2, 3):
        steps.append(len(found))
        fit(here, state, number)
        left.append([entry["momentum_buffer"].clone() for entry in state[OPTIMIZER]["state"].values()])
    assert all(buffer is None for buffer in found[steps[0]])
    assert all(buffer is not None for buffer in found[steps[1]])
    assert all(buffer is None for buffer in found[steps[2]])  # round 3 of 4: tuning
    assert left[0] and all(bool(values.any()) for values in left[0])


def test_tuning_has_no_teacher_and_stops_when_nothing_changes(tmp_path, monkeypatch):
    here, state = site(tmp_path, "trainer.distil=0.25", "trainer.local_epochs=8"), {}
    fit(here, state, 1)
    memory, steps = state[MEMORY].clone(), state[STEP]
    fields = []
    plain = here.trainer.loss
    monkeypatch.setattr(here.trainer, "loss", lambda m, b, t: (fields.append(set(b.fields)), plain(m, b, t))[1])
    fit(here, state, 2)
    assert fields and all(each == {"x"} for each in fields) and torch.equal(state[MEMORY], memory)
    labels = here.trainer.answers(here.model, here.federation.client(0).train).softmax(1)
    monkeypatch.setattr(here.trainer, "answers", lambda model, data: labels)
    stops = [fit(here, state, number)["stopped"] for number in (3, 4)]
    assert stops == [1, 1]
    done = state[STEP]
    assert steps < done < 4 * steps
    before = {name: values.clone() for name, values in here.model.state_dict().items()}
    fit(here, state, 4)
    assert state[STEP] == done and state[STOPPED]
    assert all(torch.equal(values, before[name]) for name, values in here.model.state_dict().items())


# -- federation -------------------------------------------------------------------------------------------


def test_the_trunk_travels_and_the_rest_stays(tmp_path):
    here = site(tmp_path)
    shared, kept = set(here.trainer.shared(here.model)), here.trainer.kept(here.model)
    assert shared and not shared & kept and shared | kept == set(here.model.state_dict())
    assert all(name.startswith("trunk.") for name in shared)
    norms = batchnorm.private_names(here.model, "local")
    assert norms <= kept and {"bottleneck.weight", "head.bias", "norm.running_mean"} <= kept
    every = site(tmp_path, "trainer.share=all")
    assert set(every.trainer.shared(every.model)) == {
        k for k, v in every.model.state_dict().items() if v.is_floating_point()
    }


def test_each_client_keeps_its_own_part_over_rounds_and_is_given_the_common_trunk(tmp_path):
    here, states, left = site(tmp_path), ({}, {}), {}
    trunk = {name: values.clone() for name, values in here.trainer.shared(here.model).items()}
    for number in (1, 2):
        for client, state in enumerate(states):
            turn = Turn(number, 4, client, 2, torch.Generator().manual_seed(client), received={"arrays": trunk})
            here.load(trunk, state)
            live = here.model.state_dict()
            assert all(torch.equal(live[name], values) for name, values in trunk.items())
            if number == 2:  # the other client has trained since, and this one's own part is back
                assert all(torch.equal(live[name], values) for name, values in left[client].items())
            here.train(turn, state)
            left[client] = {name: values.clone() for name, values in state[KEPT].items()}
    assert set(left[0]) == here.trainer.kept(here.model)
    for name in ("bottleneck.weight", "head.bias", "norm.weight", "norm.running_mean"):
        assert not torch.equal(left[0][name], left[1][name]), name
    norms = {name for name in left[0] if name.startswith("trunk.") and name.endswith("running_mean")}
    assert norms and all(not torch.equal(left[0][name], left[1][name]) for name in norms)


def test_the_state_survives_a_restart_and_holds_no_image(tmp_path):
    here, state = site(tmp_path), {}
    fit(here, state)
    restored = client_state.unpack(client_state.pack(state))
    assert torch.equal(restored[MEMORY], state[MEMORY]) and restored[STEP] == state[STEP]
    assert set(state) == {MEMORY, STEP, STOPPED, OPTIMIZER, "loss"}


@pytest.mark.parametrize("share", ["trunk", "all"])
def test_a_run_resumes_to_the_same_bits(tmp_path, share):
    text = SCENARIO.replace("bottleneck: 8", f"bottleneck: 8, share: {share}")
    assert resumed(tmp_path, text) == sha(tmp_path, text=text)


def test_a_run_asks_once_and_counts(tmp_path):
    current, outcome = run(tmp_path, text=SCENARIO)
    assert not outcome.failed, outcome.failed
    queries = [row["train"]["queries"] for row in lines(current)[1:]]
    assert queries[0] > 0 and queries[1:] == [0, 0, 0]


@pytest.mark.parametrize(
    ("override", "error", "said"),
    [
        ("trainer.predictor=mpl", PluginError, r"trainer\.predictor: .*'mpl'.*'mlp'"),
        ("trainer.predictor={name: mlp, hiden: [8]}", ScenarioError, r"'trainer\.predictor\.hiden'.*'hidden'"),
        ("trainer.predictor={name: mlp, hidden: [0]}", ScenarioError, r"trainer\.predictor\.hidden.*\(got 0\)"),
        ("trainer.share=both", ScenarioError, r"trainer\.share: .*'trunk' or 'all'.*\(got 'both'\)"),
    ],
)
def test_mistakes_are_named_by_the_check_before_anything_starts(tmp_path, override, error, said):
    (tmp_path / "dine.yaml").write_text(SCENARIO)
    with pytest.raises(error, match=said):
        scenario.load(tmp_path / "dine.yaml", [override])


def test_what_only_the_data_tell_is_refused_before_the_first_round(tmp_path):
    with pytest.raises(PluginError, match="no stream 'source-0'"):
        site(tmp_path, "data=digits", "partition=iid", "clients=2")
    with pytest.raises(TrellisError, match="vit"):
        site(tmp_path, "trainer.predictor={name: vit, patch: 3}")
    plain = site(tmp_path)
    object.__setattr__(plain.trainer.task, "model", nn.Flatten)
    with pytest.raises(PluginError, match="Flatten has none"):
        plain.trainer.build()


# -- the data ---------------------------------------------------------------------------------------------


def test_target_and_source_are_other_scans_and_the_shift_is_the_same_for_every_seed():
    each = {"name": "data", "data": {"name": "shifted-digits", "angles": [25.0, -25.0], "source_angles": [0.0, 90.0]}}
    one, two = (load_data(from_mapping(each), seed) for seed in (0, 1))
    assert torch.equal(one.train.fields["x"], two.train.fields["x"])
    assert sorted(set(one.natural_id)) == ["-25 degrees", "25 degrees"]
    sources = [one.splits[f"source-{k}"] for k in (0, 1)]
    assert len(one.train) + len(one.test) + len(sources[0]) == 1797
    torch.testing.assert_close(
        torch.rot90(sources[0].fields["x"], 1, (2, 3)), sources[1].fields["x"], rtol=1e-3, atol=1e-3
    )


def test_turning_is_anticlockwise_and_by_each_images_own_angle():
    x = torch.rand(3, 1, 8, 8)
    angles = torch.tensor([0.0, 90.0, 180.0])
    expected = torch.stack([torch.rot90(image, k, (1, 2)) for k, image in enumerate(x)])
    torch.testing.assert_close(turned(x, angles), expected, rtol=1e-4, atol=1e-5)
    assert (
        float((turned(turned(x, torch.full((3,), 25.0)), torch.full((3,), -25.0)) - x)[:, :, 3:5, 3:5].abs().mean())
        < 0.3
    )
    assert F.mse_loss(turned(x, torch.full((3,), 25.0)), x) > 0.01
