"""SGD, FedProx and SCAFFOLD against closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trellis import scenario
from trellis.data.base import ClientData
from trellis.errors import TrellisError
from trellis_clients.contract import bench, site_of
from trellis_clients.trainer import Turn

FILE = Path(__file__).parent / "contract.yaml"
SCAFFOLD = ["trainer=scaffold", "strategy=scaffold", "trainer.lr=0.1"]


def test_fedprox_adds_mu_half_times_the_squared_distance():
    trainer, model, batch, turn = bench(FILE, ["trainer=fedprox", "trainer.mu=0.3"])
    plain, same_model, *_ = bench(FILE)
    with torch.no_grad():
        for moved, other in zip(model.parameters(), same_model.parameters(), strict=True):
            moved.add_(0.01)
            other.add_(0.01)
    distance = sum(0.01**2 * p.numel() for p in model.parameters())
    difference = trainer.loss(model, batch, turn) - plain.loss(same_model, batch, turn)
    assert float(difference.detach()) == pytest.approx(0.15 * distance, rel=1e-3)


def test_fedprox_gradient_pulls_towards_the_received_model():
    trainer, model, batch, turn = bench(FILE, ["trainer=fedprox", "trainer.mu=0.3"])
    plain = bench(FILE)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    wanted = torch.autograd.grad(plain.loss(model, batch, turn), list(model.parameters()))
    actual = torch.autograd.grad(trainer.loss(model, batch, turn), list(model.parameters()))
    for with_term, without in zip(actual, wanted, strict=True):
        torch.testing.assert_close(with_term - without, torch.full_like(without, 0.3 * 0.01), rtol=1e-3, atol=1e-6)


def test_the_strategys_mu_comes_before_the_configs():
    trainer, model, batch, turn = bench(FILE, ["trainer=fedprox", "trainer.mu=0.3", "strategy.name=fedprox"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    turn.config = {"proximal-mu": 0.0}
    plain = bench(FILE)[0]
    torch.testing.assert_close(trainer.loss(model, batch, turn), plain.loss(model, batch, turn))


def turn_of(site, control: float, number: int = 1) -> Turn:
    arrays = {name: values.clone() for name, values in site.model.state_dict().items()}
    received = {"arrays": arrays, "control": {name: torch.full_like(v, control) for name, v in arrays.items()}}
    return Turn(number, 2, 0, 3, torch.Generator().manual_seed(5), received=received)


def test_scaffold_takes_the_steps_of_algorithm_1():
    """y <- y - lr (g - c_i + c), and c_i+ = c_i - c + (x - y) / (K lr), computed by hand over every batch."""
    site = site_of(FILE, [*SCAFFOLD, "trainer.batch_size=40"])
    trainer, model, data = site.trainer, site.model, site.federation.client(0)
    turn, own = turn_of(site, control=0.02), 0.05
    state = {"control": {name: torch.full_like(v, own) for name, v in turn.received["control"].items()}}

    weights = {name: v.clone().requires_grad_() for name, v in model.named_parameters()}
    steps = 0
    for batch in trainer.batches(data.train, turn_of(site, 0.0)):
        logits = torch.func.functional_call(model, weights, (batch.x,))
        gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, batch.y), list(weights.values()))
        with torch.no_grad():
            for (_, weight), gradient in zip(weights.items(), gradients, strict=True):
                weight -= 0.1 * (gradient - own + 0.02)
        steps += 1

    trainer.fit(model, data, state, turn)
    assert steps > 1
    for name, weight in weights.items():
        torch.testing.assert_close(model.state_dict()[name], weight.detach(), rtol=1e-5, atol=1e-6)
        start = turn.received["arrays"][name]
        new = own - 0.02 + (start - weight.detach()) / (steps * 0.1)
        torch.testing.assert_close(state["control"][name], new, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(turn.reply["control"][name], new - own, rtol=1e-4, atol=1e-5)


def test_scaffolds_control_after_one_step_without_controls_is_the_gradient():
    site = site_of(FILE, [*SCAFFOLD, "trainer.batch_size=4096"])
    trainer, model, data = site.trainer, site.model, site.federation.client(0)
    batch = next(iter(trainer.batches(data.train, turn_of(site, 0.0))))
    gradients = torch.autograd.grad(trainer.loss(model, batch, turn_of(site, 0.0)), list(model.parameters()))
    state: dict = {}
    trainer.fit(model, ClientData(0, data.train, data.test), state, turn_of(site, 0.0))
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(state["control"][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("setting", ["trainer.momentum=0.9", "trainer.weight_decay=0.1"])
def test_scaffold_refuses_what_its_identity_does_not_hold_for(setting):
    with pytest.raises(TrellisError, match="plain SGD"):
        scenario.load(FILE, [*SCAFFOLD, setting])
