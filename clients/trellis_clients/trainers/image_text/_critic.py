"""Pieces of learning from pairs: a text encoder, a critic on two feature vectors, losses, and Lookahead."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.errors import DataError, ScenarioError


class MeanOfWords(nn.Module):
    """Text features ``(n, dim)``: the mean of the words' vectors, then a layer. Token 0 is no word."""

    def __init__(self, words: int, dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, dim, padding_idx=0)
        self.layer = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        there = (tokens > 0).float().unsqueeze(-1)
        mean = (self.words(tokens) * there).sum(1) / there.sum(1).clamp(min=1)
        out: Tensor = self.layer(F.relu(mean))
        return out


class Side(nn.Module):
    """One side of the critic: a perceptron beside a shortcut that starts as a noisy copy, then a layer norm."""

    def __init__(self, features: int, units: int) -> None:
        super().__init__()
        if units < features:
            raise ScenarioError("critic-units", f"trainer.units is {units}; the critic needs at least {features}")
        self.mlp = nn.Sequential(
            nn.Linear(features, units, bias=False), nn.BatchNorm1d(units), nn.ReLU(), nn.Linear(units, units)
        )
        self.shortcut = nn.Linear(features, units)
        self.norm = nn.LayerNorm(units)
        with torch.no_grad():
            self.shortcut.weight.uniform_(-0.01, 0.01)
            self.shortcut.weight.fill_diagonal_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.mlp(x) + self.shortcut(x))
        return out


class DotCritic(nn.Module):
    """T(f, g) = exp(s) <a, b>, with a and b the two sides' outputs at unit length and s learnt."""

    def __init__(self, image_features: int, text_features: int, units: int) -> None:
        super().__init__()
        self.image, self.text = Side(image_features, units), Side(text_features, units)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def sides(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit vectors ``(n, units)`` and ``(m, units)``, the first ones scaled by exp(s)."""
        return self.log_scale.exp() * F.normalize(self.image(f)), F.normalize(self.text(g))


def rolled(g: Tensor) -> Tensor:
    """Return each row's successor: one negative an example, never its own.

    Raises:
        DataError: there is but one row, which would be its own negative.
    """
    if len(g) < 2:
        raise DataError("pairs-single", "one pair has no negative: a batch needs two pairs or more")
    return g.roll(-1, 0)


def jensen_shannon(positive: Tensor, negative: Tensor) -> Tensor:
    """Return mean softplus(-T) over pairs plus mean softplus(T) over negatives: 2 log 2 less the bound."""
    return F.softplus(-positive).mean() + F.softplus(negative).mean()


def info_nce(a: Tensor, b: Tensor) -> Tensor:
    """Return CLIP's loss: cross-entropy among all texts of the batch, and among all images, halved."""
    scores, target = a @ b.T, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


class LookaheadSGD(torch.optim.SGD):
    """SGD whose weights are drawn back every ``k`` steps: slow <- slow + alpha (fast - slow), fast <- slow.

    Zhang et al., NeurIPS 2019, Algorithm 1. Slow weights start as the weights it is given.

    Args:
        share: of the rates, as a function of the steps taken so far, from 0.
    """

    def __init__(
        self, params: Any, k: int = 5, alpha: float = 0.5, share: Callable[[int], float] = lambda _: 1.0, **options: Any
    ) -> None:
        super().__init__(params, **options)
        self.k, self.alpha, self.share, self.taken = k, alpha, share, 0
        self.rates = [group["lr"] for group in self.param_groups]
        self.fast = [p for group in self.param_groups for p in group["params"]]
        self.slow = [p.detach().clone() for p in self.fast]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group, rate in zip(self.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.share(self.taken)
        loss: float | None = super().step(closure)
        self.taken += 1
        if self.taken % self.k == 0:
            for slow, fast in zip(self.slow, self.fast, strict=True):
                slow.lerp_(fast, self.alpha)
                fast.copy_(slow)
        return loss
