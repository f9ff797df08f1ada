"""Sharpness against closed forms: quadratics, and logistic regression with its dense Hessian."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

from trellis.models.sharpness import loss_rise, top_eigenvalue


class Point(nn.Module):
    """A vector of weights in two pieces."""

    def __init__(self, w: torch.Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(w[:2].clone())
        self.b = nn.Parameter(w[2:].clone().view(-1, 2))

    def forward(self) -> torch.Tensor:
        return torch.cat([self.a, self.b.flatten()])


def bowl(seed: int, size: int = 8):
    """Return A, w and the objective 0.5 wᵀ A w, A symmetric with eigenvalues of both signs."""
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.standard_normal((size, size)))
    matrix = torch.from_numpy(basis @ np.diag(np.linspace(-6, 4, size)) @ basis.T)
    w = torch.from_numpy(generator.standard_normal(size))
    return matrix, w, lambda model: 0.5 * model() @ matrix @ model()


def test_the_top_eigenvalue_of_a_quadratic_is_its_largest_not_the_largest_in_size():
    for seed in range(3):
        _, w, objective = bowl(seed)
        assert top_eigenvalue(Point(w), objective, 1e-10) == pytest.approx(4, rel=1e-8)


def test_a_linear_objective_is_flat():
    assert top_eigenvalue(Point(torch.ones(6).double()), lambda model: model().sum()) == pytest.approx(0, abs=1e-12)


def test_one_step_rises_by_the_closed_form():
    matrix, w, objective = bowl(1)
    g = matrix @ w
    there = w + 0.3 * g / g.norm()
    wanted = 0.5 * (there @ matrix @ there - w @ matrix @ w)
    assert loss_rise(Point(w), objective, 0.3) == pytest.approx(float(wanted), rel=1e-9)


def test_many_steps_reach_the_top_of_the_ball():
    """The largest rise of a quadratic: (mu I - A) e = A w with ‖e‖ = radius and mu above all eigenvalues."""
    matrix, w, objective = bowl(2)
    a, place, radius = matrix.numpy(), w.numpy(), 0.5

    def shift(mu: float) -> np.ndarray:
        return np.linalg.solve(mu * np.eye(len(a)) - a, a @ place)

    e = shift(brentq(lambda mu: np.linalg.norm(shift(mu)) - radius, 4 + 1e-9, 1e6))
    wanted = 0.5 * ((place + e) @ a @ (place + e) - place @ a @ place)
    first, many = loss_rise(Point(w), objective, radius), loss_rise(Point(w), objective, radius, steps=60)
    assert first < many <= wanted + 1e-12
    assert many == pytest.approx(wanted, rel=1e-3)


def logistic():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 5, generator=generator).double()
    y = torch.randint(0, 3, (40,), generator=generator)
    return nn.Linear(5, 3).double(), x, y


def test_the_top_eigenvalue_of_logistic_regression_is_that_of_its_dense_hessian():
    model, x, y = logistic()
    names = [name for name, _ in model.named_parameters()]

    def flat(vector: torch.Tensor) -> torch.Tensor:
        parts = {"weight": vector[:15].view(3, 5), "bias": vector[15:]}
        return F.cross_entropy(functional_call(model, parts, (x,)), y)

    dense = hessian(flat)(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert names == ["weight", "bias"]
    wanted = float(torch.linalg.eigvalsh(dense)[-1])
    found = top_eigenvalue(model, lambda m: F.cross_entropy(m(x), y), 1e-10)
    assert found == pytest.approx(wanted, rel=1e-8)
    assert top_eigenvalue(model, lambda m: F.cross_entropy(m(x), y), 1e-10) == found, "twice the same bits"
    single = top_eigenvalue(model.float(), lambda m: F.cross_entropy(m(x.float()), y))
    assert single == pytest.approx(wanted, rel=1e-3)


def test_for_small_balls_one_step_rises_by_radius_times_the_gradients_norm():
    model, x, y = logistic()
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    rise = loss_rise(model, lambda m: F.cross_entropy(m(x), y), 1e-4)
    assert rise == pytest.approx(1e-4 * float(norm), rel=1e-3)


def test_measuring_changes_nothing():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    model[0].bias.requires_grad_(False)
    model[3].eval()
    _, x, y = logistic()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    for _ in range(2):
        loss_rise(model, lambda m: F.cross_entropy(m(x), y), 0.3, steps=3)
        top_eigenvalue(model, lambda m: F.cross_entropy(m(x), y))
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name]), name
    assert all(p.grad is None for p in model.parameters())
    assert [module.training for module in model] == [True, True, True, False, True]
