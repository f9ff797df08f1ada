"""MOON against the formula of its paper."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trellis.errors import PluginError
from trellis_clients import contract
from trellis_clients.contract import site_of
from trellis_clients.trainer import Turn, in_order
from trellis_clients.trainers.basic import moon

FILE = Path(__file__).parent / "contract.yaml"
MOON = ["trainer=moon", "trainer.lr=0.1", "trainer.mu=0.7", "trainer.temperature=0.3"]


def turn_of(site, number: int = 1) -> Turn:
    arrays = {name: values.clone() for name, values in site.trainer.shared(site.model).items()}
    return Turn(number, 2, 0, 3, torch.Generator().manual_seed(5), received={"arrays": arrays})


def moved(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}


def test_the_loss_is_equation_3():
    generator = np.random.default_rng(0)
    z, near, far = generator.normal(size=(3, 6, 4))

    def cosine(a, b):
        return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    for tau in (0.1, 0.5, 2.0):
        positive, negative = np.exp(cosine(z, near) / tau), np.exp(cosine(z, far) / tau)
        wanted = -np.log(positive / (positive + negative)).mean()
        assert float(moon.contrast(*map(torch.from_numpy, (z, near, far)), tau)) == pytest.approx(wanted, rel=1e-12)


def test_equal_models_cost_the_logarithm_of_two():
    z = torch.randn(3, 5)
    assert float(moon.contrast(z, z + 1, z + 1, 0.5)) == pytest.approx(np.log(2))


def test_a_turn_takes_the_steps_of_algorithm_1():
    """Every step of a second turn by hand: cross-entropy plus mu times the contrast of three models' features."""
    site = site_of(FILE, MOON)
    trainer, model, data = site.trainer, site.model, site.federation.client(0)
    own = moved(model, 1)
    turn = turn_of(site)
    anchor, previous, hand = (copy.deepcopy(model) for _ in range(3))
    previous.load_state_dict(own)
    for batch in trainer.batches(data.train, turn_of(site)):
        z = hand.features(batch.x)
        near, far = anchor.features(batch.x).detach(), previous.features(batch.x).detach()
        positive = (F.cosine_similarity(z, near) / 0.3).exp()
        negative = (F.cosine_similarity(z, far) / 0.3).exp()
        loss = F.cross_entropy(hand.head(z), batch.y) - 0.7 * (positive / (positive + negative)).log().mean()
        gradients = torch.autograd.grad(loss, list(hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(hand.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    state = {moon.PREVIOUS: own}
    trainer.fit(model, data, state, turn)
    for name, values in hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], values, rtol=1e-4, atol=1e-5)
        assert torch.equal(state[moon.PREVIOUS][name], model.state_dict()[name])


@pytest.mark.parametrize("overrides", [[], ["trainer.mu=0.0"]], ids=["first turn", "mu is zero"])
def test_without_a_previous_model_or_weight_it_is_sgd(overrides):
    ours, plain = site_of(FILE, [*MOON, *overrides]), site_of(FILE, ["trainer.lr=0.1"])
    state = {moon.PREVIOUS: moved(ours.model, 2)} if overrides else {}
    for site, kept in ((ours, state), (plain, {})):
        site.trainer.fit(site.model, site.federation.client(0), kept, turn_of(site))
    for name, values in plain.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], values)
    assert moon.PREVIOUS in state


def test_the_contrast_pulls_features_towards_the_global_model():
    """After a turn with a heavy contrast, features lie nearer to the received model's than after plain SGD."""
    similarities = []
    for mu in (0.0, 20.0):
        site = site_of(FILE, [*MOON, f"trainer.mu={mu}", "trainer.local_epochs=5"])
        anchor, data = copy.deepcopy(site.model), site.federation.client(0)
        site.trainer.fit(site.model, data, {moon.PREVIOUS: moved(site.model, 3)}, turn_of(site))
        batch = next(in_order(data.train, 400))
        with torch.no_grad():
            similarities.append(F.cosine_similarity(site.model.features(batch.x), anchor.features(batch.x)).mean())
    assert similarities[1] > similarities[0]


def test_frozen_models_are_left_alone():
    site = site_of(FILE, [*MOON, "model={name: small-cnn, norm: batch, width: 2}"])
    state = {moon.PREVIOUS: {k: v.clone() for k, v in site.trainer.shared(site.model).items()}}
    received = turn_of(site)
    site.trainer.fit(site.model, site.federation.client(0), state, received)
    for name, values in site.trainer.shared(site.trainer.anchor).items():
        assert torch.equal(values, received.received["arrays"][name]), name
    assert not site.trainer.anchor.training
    assert site.model.training


def test_a_model_without_features_is_said():
    site = site_of(FILE, MOON)
    site.trainer.task = replace(site.trainer.task, model=nn.Flatten)
    with pytest.raises(PluginError, match=r"Flatten has no features\(x\) and head"):
        site.trainer.build()


@pytest.mark.parametrize("policy", ["average", "local"])
def test_contract(policy):
    contract.check(FILE, [*MOON, "model={name: small-cnn, norm: batch, width: 2}", f"trainer.batch_norm={policy}"])
