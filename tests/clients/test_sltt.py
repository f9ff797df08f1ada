"""Spiking neurons against their equations, gradients with and without time, events against the motion they show."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import snntorch
import torch
from torch.nn import functional as F

from federations import lines, run, sha
from test_bits import resumed
from trellis import scenario
from trellis.data.base import Batch
from trellis.data.loading import load_data
from trellis.errors import ScenarioError
from trellis.models import spiking
from trellis_clients import contract

SCENARIO = Path(__file__).parents[2] / "scenarios" / "trainers" / "sltt.yaml"
TEXT = """\
name: sltt
data: {name: moving-digit-events, steps: 3, test_fraction: 0.8}
clients: 2
model: {name: spiking-cnn, width: 2}
trainer: {name: sltt, batch_size: 32, steps: 2}
rounds: {count: 4}
runtime: {grid: local}
"""


def bench(*overrides: str):
    return contract.bench(SCENARIO, ["variants={}", *overrides])


def gradients(trainer, model, batch, turn) -> list[torch.Tensor]:
    """Return what one step's backward passes leave, from the batch-norm statistics that are there."""
    kept = {name: values.clone() for name, values in model.state_dict().items()}
    model.train()
    model.zero_grad(set_to_none=True)
    trainer.backward(model, batch, turn)
    found = [p.grad.clone() for p in model.parameters()]
    model.load_state_dict(kept)
    return found


def compare(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Return the cosine of two gradients."""
    return float(F.cosine_similarity(torch.cat([x.flatten() for x in a]), torch.cat([x.flatten() for x in b]), dim=0))


# -- events -----------------------------------------------------------------------------------------------------------


def test_events_are_the_changes_of_a_moving_digit():
    """Without noise and with the least threshold, adding events up tells where the digit went."""
    from sklearn.datasets import load_digits

    from trellis.data.sets.moving_digit_events import MovingDigitEvents, drawn, events

    source = MovingDigitEvents(MovingDigitEvents.Config(size=12, steps=9), Path())
    places = source.walks(50, np.random.default_rng(0))
    assert places.shape == (50, 10, 2)
    assert places.min() == 0
    assert places.max() == 4
    moves = np.abs(np.diff(places, axis=1))
    assert moves.max() == 1
    assert (moves.max(2) == 1).all()  # always under way
    images = load_digits().images[:50].astype(np.float32) / 16
    frames = drawn(images, places, 12)
    row, column = places[3, 4]
    assert np.array_equal(frames[3, 4, row : row + 8, column : column + 8], images[3])
    assert frames[3, 4].sum() == images[3].sum()
    found = events(frames, 0.2)
    assert found.shape == (50, 9, 2, 12, 12)
    change = frames[:, 1:] - frames[:, :-1]
    assert np.array_equal(found[:, :, 0], change > 0.2)
    assert np.array_equal(found[:, :, 1], -change > 0.2)
    assert not (found[:, :, 0] & found[:, :, 1]).any()


def test_what_is_real_stays_and_what_is_made_follows_the_seed():
    loaded = scenario.load(SCENARIO, ["variants={}"])
    first, other = load_data(loaded, 0), load_data(loaded, 1)
    assert first.kind == "events"
    assert first.example_shape == (6, 2, 10, 10)
    assert torch.equal(first.train.fields["y"], other.train.fields["y"])
    assert not torch.equal(first.train.fields["x"], other.train.fields["x"])
    assert set(first.train.fields["x"].unique().tolist()) == {0.0, 1.0}


# -- neurons ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 1.1, 2.0])
def test_neurons_follow_their_equations(tau):
    layer = spiking.Lif(tau)
    inputs = torch.randn(30, 7, generator=torch.Generator().manual_seed(0)) * 2
    rest = np.zeros(7)
    for x in inputs:
        v = (1 - 1 / tau) * rest + x.numpy().astype(np.float64)
        spikes = (v >= 1).astype(np.float64)
        rest = v - spikes  # soft: what is above the threshold stays
        assert np.array_equal(layer(x).numpy(), spikes)
    np.testing.assert_allclose(layer.rest.numpy(), rest, rtol=1e-5, atol=1e-6)
    spiking.reset(layer)
    assert layer.rest is None
    assert layer.state_dict() == {}


@pytest.mark.parametrize("tau", [1.0, 1.1, 1.5, 2.0])
def test_neurons_are_those_of_a_library(tau):
    """With the same leak, threshold and soft reset, and inputs that cannot make two spikes at once."""
    ours, theirs = spiking.Lif(tau), snntorch.Leaky(1 - 1 / tau, 1.0, reset_mechanism="subtract", reset_delay=False)
    inputs = 1.4 * torch.rand(60, 500, generator=torch.Generator().manual_seed(1))
    rest, spikes = torch.zeros(500), 0
    for x in inputs:
        wanted, rest = theirs(x, rest)
        found = ours(x)
        assert torch.equal(found, wanted)
        torch.testing.assert_close(ours.rest, rest)
        spikes += int(found.sum())
    assert 0.1 < spikes / inputs.numel() < 0.9


@pytest.mark.parametrize("tau", [1.0, 1.1, 1e17])
def test_neurons_of_the_network_have_the_time_constant_asked_for(tau):
    _, model, batch, _ = bench(f"model.tau={tau}", "model.surrogate=sigmoid")
    assert [(layer.leak, layer.surrogate) for layer in spiking.neurons(model)] == [(1 - 1 / tau, "sigmoid")] * 2
    assert bool(torch.isfinite(model(batch.x)).all())


@pytest.mark.parametrize("kind", ["triangle", "rectangle", "sigmoid"])
def test_surrogates_integrate_to_one(kind):
    u = torch.linspace(-20, 20, 400001, dtype=torch.float64)
    assert float(torch.trapezoid(spiking.surrogate_derivative(u, kind), u)) == pytest.approx(1, abs=1e-3)
    x = torch.tensor([0.6, 1.0, 1.3], requires_grad=True)
    spiking.Lif(surrogate=kind)(x).sum().backward()
    torch.testing.assert_close(x.grad, spiking.surrogate_derivative(x.detach() - 1, kind))


@pytest.mark.parametrize("through_time", [False, True])
def test_two_layers_and_two_steps_by_hand(through_time):
    """e_l[t] = (e_l+1[t] W_l+1) ds/dv_l[t], and through time (1 - 1/tau) (1 - ds/dv) of what comes from t + 1."""
    tau, x, w1, w2 = 2.0, [0.9, 0.7], 1.0, 1.1
    first, second = spiking.Lif(tau), spiking.Lif(tau)
    a, b = (torch.tensor(w, requires_grad=True) for w in (w1, w2))
    for layer in (first, second):
        layer.through_time = through_time
    outputs = [second(b * first(a * torch.tensor(value))) for value in x]
    (1.0 * outputs[0] + 2.0 * outputs[1]).backward()

    leak = 1 - 1 / tau

    def ds(v):
        return max(0.0, 1 - abs(v - 1))

    v1 = [w1 * x[0]]
    s1 = [float(v1[0] >= 1)]
    v1.append(leak * (v1[0] - s1[0]) + w1 * x[1])
    s1.append(float(v1[1] >= 1))
    v2 = [w2 * s1[0]]
    s2 = [float(v2[0] >= 1)]
    v2.append(leak * (v2[0] - s2[0]) + w2 * s1[1])
    assert (s1, v2[1] >= 1) == ([0.0, 1.0], True)
    carry = leak * through_time
    d2 = [0.0, 2.0 * ds(v2[1])]
    d2[0] = 1.0 * ds(v2[0]) + d2[1] * carry * (1 - ds(v2[0]))
    d1 = [0.0, d2[1] * w2 * ds(v1[1])]
    d1[0] = d2[0] * w2 * ds(v1[0]) + d1[1] * carry * (1 - ds(v1[0]))
    assert float(b.grad) == pytest.approx(sum(d * s for d, s in zip(d2, s1, strict=True)))
    assert float(a.grad) == pytest.approx(sum(d * value for d, value in zip(d1, x, strict=True)))


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "same"),
    [(["data.steps=1"], True), (["model.tau=1.0"], True), ([], False), (["model.tau=2.0"], False)],
    ids=["one step", "no memory", "tau 1.1", "tau 2"],
)
def test_without_time_to_pass_through_both_gradients_are_one(overrides, same):
    found = []
    for gradient in ("sltt", "bptt"):
        trainer, model, batch, turn = bench(*overrides, f"trainer.gradient={gradient}")
        found.append(gradients(trainer, model, batch, turn))
    close = all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*found, strict=True))
    assert close is same
    assert compare(*found) > (0.9 if "model.tau=2.0" not in overrides else 0.5)


def test_many_backward_passes_are_one():
    """Sent back step by step, the gradient is that of the summed loss whose graph is cut between steps."""
    trainer, model, batch, turn = bench()
    steps = gradients(trainer, model, batch, turn)
    model.train()
    model.zero_grad(set_to_none=True)
    trainer.loss(model, batch, turn).backward()
    for a, p in zip(steps, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-7)


def test_the_forward_pass_does_not_know_of_gradients():
    """Outputs of every step and statistics behind neurons are the same bits, whatever is sent back."""
    seen = []
    for overrides in (["trainer.gradient=sltt"], ["trainer.gradient=bptt"], ["trainer.steps=2"]):
        trainer, model, batch, turn = bench("model.tau=2.0", *overrides)
        outputs, step = [], model.step

        def recorded(frame, step=step, outputs=outputs):
            outputs.append(step(frame))
            return outputs[-1]

        model.step = recorded
        loss = trainer.backward(model.train(), batch, turn)
        assert len(outputs) == 6
        assert isinstance(model.body[4], torch.nn.Conv2d)  # behind the first layer's neurons
        behind = model.body[5]
        assert int(behind.num_batches_tracked) == 6
        seen.append((float(loss), [*(output.detach() for output in outputs), behind.running_mean, behind.running_var]))
    (first, wanted), *others = seen
    for loss, found in others:
        assert loss == pytest.approx(first)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("rescale", [False, True])
def test_drawn_steps_are_unbiased_up_to_their_share(monkeypatch, rescale):
    """The mean over all choices of 2 of 6 steps is a third of the whole gradient; rescaled, the whole."""
    trainer, model, batch, turn = bench("trainer.steps=2", f"trainer.rescale={str(rescale).lower()}")
    sums = None
    choices = [set(pair) for pair in combinations(range(6), 2)]
    for choice in choices:
        monkeypatch.setattr(trainer, "chosen", lambda count, turn, c=choice: c)
        found = gradients(trainer, model, batch, turn)
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
    monkeypatch.setattr(trainer, "chosen", lambda count, turn: set(range(count)))
    whole = gradients(trainer, model, batch, turn)
    for a, b in zip(sums, whole, strict=True):
        torch.testing.assert_close(a / len(choices), b * (1 if rescale else 1 / 3), rtol=1e-3, atol=1e-6)


def test_as_many_steps_as_there_are_is_sltt():
    found = []
    for overrides in ([], ["trainer.steps=6"], ["trainer.steps=99"]):
        trainer, model, batch, turn = bench(*overrides)
        found.append(gradients(trainer, model, batch, turn))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))
    trainer, _, _, turn = bench("trainer.steps=2")
    draws = {tuple(sorted(trainer.chosen(6, turn))) for _ in range(200)}
    assert draws == set(combinations(range(6), 2))


class Held:
    """Counts the bytes that wait for a backward pass, each tensor once, and the most there were at a time."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.most = self.now = 0

    def pack(self, tensor: torch.Tensor):
        outer, key, size = self, tensor.data_ptr(), tensor.nbytes

        class Kept:
            def __init__(self) -> None:
                self.tensor = tensor
                outer.counts[key] = outer.counts.get(key, 0) + 1
                outer.now += size if outer.counts[key] == 1 else 0
                outer.most = max(outer.most, outer.now)

            def __del__(self) -> None:
                outer.counts[key] -= 1
                outer.now -= size if outer.counts[key] == 0 else 0

        return Kept()


def test_memory_grows_with_time_only_through_time():
    most = {}
    for gradient in ("sltt", "bptt"):
        for steps in (2, 8):
            trainer, model, batch, turn = bench(f"data.steps={steps}", f"trainer.gradient={gradient}")
            held = Held()
            with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda kept: kept.tensor):
                trainer.backward(model.train(), batch, turn)
            assert held.now == 0
            most[gradient, steps] = held.most
    assert most["bptt", 8] / most["bptt", 2] > 3
    assert most["sltt", 8] / most["sltt", 2] < 1.1


# -- the federation ---------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_batch():
    trainer, model, batch, turn = bench()
    model.eval()
    first = model(batch.x)
    assert torch.equal(model(batch.x), first)
    trainer.backward(model, Batch({"x": batch.x[:3], "y": batch.y[:3]}, batch.index[:3]), turn)
    assert all(layer.rest is None for layer in spiking.neurons(model))
    with torch.no_grad():
        steps = [model.step(frame) for frame in model.frames(batch.x)]
    torch.testing.assert_close(torch.stack(steps).mean(0), first)
    assert not any("rest" in name for name in contract.site_of(SCENARIO).names)


def test_images_are_shown_at_every_step():
    trainer, model, batch, turn = bench("data=digits", "model.steps=3")
    frames = list(model.frames(batch.x))
    assert len(frames) == 3
    assert all(frame is batch.x for frame in frames)
    assert float(trainer.backward(model.train(), batch, turn)) > 0


def test_other_models_are_refused_and_so_are_drawn_steps_through_time():
    with pytest.raises(ScenarioError, match="spiking-cnn"):
        contract.site_of(SCENARIO, ["variants={}", "model=mlp"])
    for change, value in (("steps=2", "2"), ("rescale=true", "True")):
        with pytest.raises(
            ScenarioError, match=rf"trainer\.{change.split('=')[0]}: for gradient 'sltt' only.*got {value}"
        ):
            scenario.load(SCENARIO, ["variants={}", "trainer.gradient=bptt", f"trainer.{change}"])


@pytest.mark.parametrize("policy", ["average", "local"])
def test_a_run_resumes_to_the_same_bits(tmp_path, policy):
    text = TEXT.replace("steps: 2", f"steps: 2, batch_norm: {policy}")
    assert resumed(tmp_path, text) == sha(tmp_path, text=text)


def test_batch_norm_can_stay_at_home(tmp_path):
    current, _ = run(tmp_path, ("trainer.batch_norm=local", "rounds.count=2"), TEXT)
    from safetensors.torch import load_file

    names = set(load_file(current.path / "cells/main-seed0/model.safetensors"))
    assert names == {"body.0.weight", "body.4.weight", "head.weight", "head.bias"}
    assert lines(current)[-1]["federated"]["accuracy"] > 0


@pytest.mark.parametrize("change", ["trainer.gradient=bptt", "trainer.steps=2"])
def test_contract(change):
    contract.check(SCENARIO, ["variants={}", "data.test_fraction=0.9", "trainer.local_epochs=1", change])
