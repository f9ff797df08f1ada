"""SAM, ESAM, SAF and MESA against closed forms, each other, and an independent SAM."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_optimizer import SAM
from torch import nn
from torch.nn import functional as F

from trellis.data.base import Batch
from trellis_clients import contract
from trellis_clients.contract import bench, site_of
from trellis_clients.trainer import Turn
from trellis_clients.trainers.sharpness import _perturbation as perturbation
from trellis_clients.trainers.sharpness._trajectory import trajectory_loss

FILE = Path(__file__).parent / "contract.yaml"
NORMED = "model={name: small-cnn, norm: batch, width: 2, hidden: 16}"
NAMES = ["sam", "esam", "saf", "mesa-saf"]


def turn_of(site, number: int = 1, seed: int = 5) -> Turn:
    arrays = {name: values.clone() for name, values in site.trainer.shared(site.model).items()}
    return Turn(number, 9, 0, 3, torch.Generator().manual_seed(seed), received={"arrays": arrays})


@cache
def trained(*overrides: str, turns: int = 1, drop: float = 0.0) -> dict[str, torch.Tensor]:
    """Return the model after some turns of one client, each from where the last one ended."""
    site = site_of(FILE, list(overrides))
    if drop:
        site.model.body = nn.Sequential(site.model.body, nn.Dropout(drop))
    state: dict = {}
    for number in range(1, turns + 1):
        torch.manual_seed(number)
        site.trainer.fit(site.model, site.federation.client(0), state, turn_of(site, number))
    return {name: values.clone() for name, values in site.model.state_dict().items()}


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def with_trainer(name: str, *settings: str) -> list[str]:
    return [f"trainer={name}", *(f"trainer.{setting}" for setting in settings)]


# -- what they are without what makes them special ---------------------------------------------------------

NEUTRAL = {
    "sam with rho 0": with_trainer("sam", "rho=0.0"),
    "saf with lambda 0": with_trainer("saf", "weight=0.0", "start_epoch=0"),
    "saf before its start": with_trainer("saf", "start_epoch=6"),
    "saf before its first look back": with_trainer("saf", "start_epoch=0", "lookback=6"),
    "mesa with lambda 0": with_trainer("mesa-saf", "weight=0.0", "start_epoch=0"),
    "mesa before its start": with_trainer("mesa-saf", "start_epoch=6"),
}


@pytest.mark.parametrize("model", ["model={name: mlp, hidden: [16]}", NORMED], ids=["mlp", "batch norm"])
@pytest.mark.parametrize("name", NEUTRAL)
def test_switched_off_it_is_sgd_bit_for_bit(name, model):
    """Three turns of two epochs, with momentum, weight decay and dropout. Running statistics are among the bits."""
    common = [model, "trainer.local_epochs=2", "trainer.momentum=0.9", "trainer.weight_decay=0.001"]
    plain = trained("trainer=sgd", *common, turns=3, drop=0.3)
    assert same(plain, trained(*NEUTRAL[name], *common, turns=3, drop=0.3))


@pytest.mark.parametrize(
    "settings",
    [
        with_trainer("sam"),
        with_trainer("esam"),
        with_trainer("saf", "start_epoch=0", "lookback=1"),
        with_trainer("mesa-saf", "start_epoch=0", "decay=0.9"),
    ],
    ids=NAMES,
)
def test_switched_on_it_is_not(settings):
    assert not same(trained("trainer=sgd", "trainer.local_epochs=2"), trained(*settings, "trainer.local_epochs=2"))


def test_an_average_without_inertia_is_the_model_itself():
    """beta = 0: v = w, so the loss is exactly zero and so is its gradient, with dropout and batch norm."""
    common = [NORMED, "trainer.local_epochs=2"]
    mesa = trained(*with_trainer("mesa-saf", "decay=0.0", "start_epoch=0", "weight=50.0"), *common, drop=0.3)
    plain = trained("trainer=sgd", *common, drop=0.3)
    for name, values in plain.items():
        torch.testing.assert_close(mesa[name], values, rtol=1e-4, atol=1e-6)


# -- SAM ---------------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """0.5 wᵀ A w as a model: what it returns is the loss, whatever the example."""

    def __init__(self, matrix: torch.Tensor, w: torch.Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.a, self.b = nn.Parameter(w[:2].clone()), nn.Parameter(w[2:].clone())

    def forward(self) -> torch.Tensor:
        w = torch.cat([self.a, self.b])
        return 0.5 * w @ self.matrix @ w


def test_on_a_quadratic_the_gradient_is_that_of_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(5, 5, generator=generator).double()
    matrix, w = half @ half.T, torch.randn(5, generator=generator).double()
    model = Quadratic(matrix, w)
    weights = perturbation.trained(model)
    for factor in (1.0, 1e3):  # the ascent does not depend on the loss's scale
        shift = perturbation.ascent(factor * model(), weights, 0.3)
        g = matrix @ w
        torch.testing.assert_close(torch.cat(list(shift.values())), 0.3 * g / g.norm())
    loss = perturbation.at(model, perturbation.moved(weights, shift), lambda there: there())
    found = torch.cat(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(found, matrix @ (w + 0.3 * g / g.norm()), rtol=1e-10, atol=1e-10)
    assert torch.equal(torch.cat([model.a, model.b]), w), "the weights have moved"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sam_is_the_sam_of_pytorch_optimizer(dtype):
    """Two epochs of steps with momentum and weight decay against another's implementation from the same weights."""
    settings = [*with_trainer("sam", "rho=0.1", "momentum=0.9", "weight_decay=0.01", "lr=0.05"), NORMED]
    site = site_of(FILE, [*settings, "trainer.local_epochs=2"])
    trainer, data = site.trainer, site.federation.client(0)
    fields = {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.train.fields.items()}
    data = replace(data, train=replace(data.train, fields=fields))
    model = site.model.to(dtype)
    theirs = copy.deepcopy(model).train()
    optimizer = SAM(theirs.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9, weight_decay=0.01)
    for batch in trainer.batches(data.train, turn_of(site)):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = F.cross_entropy(theirs(batch.x), batch.y)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
    trainer.fit(model, data, {}, turn_of(site))
    tolerance = {torch.float32: 2e-4, torch.float64: 1e-6}[dtype]  # theirs sums the norm in single precision
    for name, values in theirs.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], values, rtol=tolerance, atol=tolerance)


# -- ESAM --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["model={name: mlp, hidden: [16]}", NORMED], ids=["mlp", "batch norm"])
def test_with_all_tensors_and_all_examples_esam_is_sam(model):
    common = [model, "trainer.local_epochs=2", "trainer.momentum=0.9", "trainer.rho=0.1"]
    sam = trained(*with_trainer("sam"), *common)
    assert same(sam, trained(*with_trainer("esam", "beta=1.0", "gamma=1.0"), *common))


def test_the_ascent_has_length_rho_over_beta_on_the_chosen_tensors():
    _, model, batch, _ = bench(FILE, with_trainer("esam", "rho=0.2", "beta=0.4"))
    weights = perturbation.trained(model)
    some = {name: weights[name] for name in list(weights)[1:3]}
    gradients = torch.autograd.grad(F.cross_entropy(model(batch.x), batch.y), list(some.values()))
    shift = perturbation.ascent(F.cross_entropy(model(batch.x), batch.y), some, 0.2 / 0.4)
    assert list(shift) == list(some)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    for eps, gradient in zip(shift.values(), gradients, strict=True):
        torch.testing.assert_close(eps, 0.5 * gradient / norm)
    assert perturbation.ascent(torch.zeros(()), {}, 1.0) == {}


def test_tensors_are_chosen_with_probability_beta_anew_in_every_step(monkeypatch):
    trainer, model, batch, turn = bench(FILE, with_trainer("esam", "beta=0.6"))
    drawn: list[tuple[str, ...]] = []
    chosen = type(trainer).chosen
    monkeypatch.setattr(
        trainer, "chosen", lambda weights: drawn.append(tuple(found := chosen(trainer, weights))) or found
    )
    torch.manual_seed(0)
    steps = 300
    for _ in range(steps):
        trainer.loss(model, batch, turn)
    counts = Counter(name for names in drawn for name in names)
    deviation = np.sqrt(steps * 0.6 * 0.4)
    assert set(counts) == set(dict(model.named_parameters()))
    assert all(abs(count - 0.6 * steps) < 4 * deviation for count in counts.values()), counts
    assert len(set(drawn)) == 2 ** len(counts), "every set of four tensors comes up in 300 draws"


@pytest.mark.parametrize(("gamma", "kept"), [(0.5, 4), (0.3, 2), (0.01, 1), (1.0, 8)])
def test_the_examples_whose_loss_rises_most_are_kept(gamma, kept):
    trainer, model, batch, _ = bench(FILE, with_trainer("esam", f"gamma={gamma}"))
    weights = perturbation.trained(model)
    before = F.cross_entropy(model(batch.x), batch.y, reduction="none")
    there = perturbation.moved(weights, perturbation.ascent(before.mean(), weights, 1.0))
    rise = perturbation.at(model, there, lambda m: F.cross_entropy(m(batch.x), batch.y, reduction="none")) - before
    found = trainer.most_sensitive(model, there, batch, before.detach())
    inside = torch.isin(batch.index, found.index)
    assert len(found) == kept == int(inside.sum())
    if kept < len(batch):
        assert rise[inside].min() >= rise[~inside].max()
    rows = [int((batch.index == i).nonzero()) for i in found.index]
    assert torch.equal(found.x, batch.x[rows]) and torch.equal(found.y, batch.y[rows])


def test_an_esam_step_by_hand(monkeypatch):
    """The gradient of a step with two of four tensors moved and half of the batch, computed with a moved copy."""
    trainer, model, batch, turn = bench(FILE, with_trainer("esam", "rho=0.3", "beta=0.5"))
    names = [name for name, _ in model.named_parameters()][:2]
    monkeypatch.setattr(trainer, "chosen", lambda weights: {name: weights[name] for name in names})
    copied = copy.deepcopy(model)
    parts = [p for name, p in copied.named_parameters() if name in names]
    before = F.cross_entropy(copied(batch.x), batch.y, reduction="none")
    gradients = torch.autograd.grad(before.mean(), parts)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    with torch.no_grad():
        for part, gradient in zip(parts, gradients, strict=True):
            part += 0.6 * gradient / norm
    after = F.cross_entropy(copied(batch.x), batch.y, reduction="none")
    worst = (after - before).detach().argsort()[-4:]
    wanted = torch.autograd.grad(after[worst].mean(), list(copied.parameters()))
    found = torch.autograd.grad(trainer.loss(model, batch, turn), list(model.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# -- passes ------------------------------------------------------------------------------------------------


def counted(name: str, *settings: str) -> tuple[int, int, list[int]]:
    """Return forwards with and without gradients in one step of eight examples, and the batch sizes of the former."""
    trainer, model, batch, turn = bench(FILE, with_trainer(name, *settings))
    if name == "saf":
        list(trainer.batches(site_of(FILE).federation.client(0).train, turn))
    if name == "mesa-saf":
        trainer.epoch = 100
    sizes: list[int] = []
    blind = []
    model.body.register_forward_hook(
        lambda _, args, output: sizes.append(len(args[0])) if output.requires_grad else blind.append(1)
    )
    trainer.loss(model, batch, turn).backward()
    return len(sizes), len(blind), sizes


def test_each_takes_the_passes_that_its_paper_counts():
    assert counted("sgd") == (1, 0, [8])
    assert counted("sam") == (2, 0, [8, 8])
    assert counted("esam") == (2, 1, [8, 4]), "(1 + gamma) gradients an example"
    assert counted("saf", "start_epoch=0", "lookback=1") == (1, 0, [8])
    assert counted("mesa-saf") == (1, 1, [8])


@pytest.mark.parametrize("name", NAMES)
def test_running_statistics_are_updated_once_a_step_and_at_the_models_own_weights(name):
    trainer, model, batch, turn = bench(FILE, [*with_trainer(name), NORMED])
    if name == "saf":
        list(trainer.batches(site_of(FILE).federation.client(0).train, turn))
    if name == "mesa-saf":
        trainer.epoch = 100
    model.train()
    plain = copy.deepcopy(model)
    plain(batch.x)
    trainer.loss(model, batch, turn)
    found = {k: v for k, v in model.state_dict().items() if "running" in k or "tracked" in k}
    assert found
    for key, values in found.items():
        assert torch.equal(values, plain.state_dict()[key]), key
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("name", ["sam", "esam"])
def test_losses_before_and_after_the_ascent_are_of_the_same_dropout_masks(name):
    """With a ball of no size all passes see the same network, so all masks that were drawn must agree."""
    trainer, model, batch, turn = bench(FILE, with_trainer(name, "rho=0.0"))
    model.body = nn.Sequential(model.body, nn.Dropout(0.5))
    model.train()
    outputs: list[torch.Tensor] = []
    model.body.register_forward_hook(lambda _, args, output: outputs.append(output.detach()))
    torch.manual_seed(3)
    trainer.loss(model, batch, turn)
    assert torch.equal(outputs[0], outputs[1])


# -- the contract ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_contract_with_batch_norm_of_the_clients_own(name):
    early = ["trainer.start_epoch=0"] if name in ("saf", "mesa-saf") else []
    early += ["trainer.lookback=1"] if name == "saf" else ["trainer.average=keep"] if early else []
    contract.check(FILE, [*with_trainer(name), *early, NORMED, "trainer.batch_norm=local"])


def test_nothing_but_weights_is_sent():
    for name in NAMES:
        site = site_of(FILE, with_trainer(name))
        turn, batch = turn_of(site), site.federation.client(0)
        site.trainer.fit(site.model, batch, {}, turn)
        assert turn.reply == {}
        assert list(site.trainer.shared(site.model)) == list(site.model.state_dict())


def test_examples_with_many_labels_each_are_taken():
    """ESAM's losses of a sequence are means over its places; SAF's past keeps the outputs' shape."""
    from trellis_clients.trainers.sharpness.esam import losses

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 3, 5, generator=generator), torch.randint(0, 3, (4, 5), generator=generator)
    batch = Batch({"x": x, "y": y}, torch.arange(4))
    torch.testing.assert_close(losses(nn.Identity(), batch).mean(), F.cross_entropy(x, y))
    torch.testing.assert_close(trajectory_loss(x, -x, 2.0), trajectory_loss(x, -x, 2.0, torch.ones(4).bool()))
