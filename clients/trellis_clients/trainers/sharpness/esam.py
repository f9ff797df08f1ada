"""ESAM: SAM that perturbs a random part of the weights and descends on the batch's most sensitive examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.data.base import Batch
from trellis.registry import register
from trellis_clients.trainer import NonNegative, Trainer, TrainerConfig, Turn
from trellis_clients.trainers.sharpness import _perturbation as perturbation

Share = Annotated[float, Field(gt=0, le=1)]


@register(
    "trainers",
    "esam",
    paper="Du et al., Efficient Sharpness-aware Minimization for Improved Training of Neural Networks, ICLR 2022",
    takes=("image", "vector", "tokens", "series", "points"),
    sends="weights",
)
class Esam(Trainer):
    """ESAM (Algorithm 1): stochastic weight perturbation (section 3.1) and sharpness-sensitive data selection (3.2).

    Every parameter tensor takes part in the ascent with probability beta; eps = (rho / beta) · g / ‖g‖ over those that
    do. Of the batch, the share gamma whose loss rose most from w to w + eps is kept, and the step goes down the mean
    loss of these at w + eps, for all weights. With beta = gamma = 1 it is SAM. Defaults are the paper's for CIFAR-10.

    Unlike the authors' code, which draws the next step's tensors at the end of a step, tensors are drawn anew in every
    step, the first included; exactly round(gamma · n) examples are kept, at least one, where that code drops the one
    at the threshold; and without selection (gamma = 1) there is no pass to select by. Losses before and after the
    ascent are of the same dropout masks; only the first pass updates batch norm's running statistics, which are so of
    w and of the whole batch. The reported loss is the objective, that of the kept examples at w + eps.

    The mean over the harder examples has a larger gradient, up to 1 / gamma times where the others are learnt:
    selection acts like a higher learning rate, and diverges where that would. Measured on digits under Dirichlet 0.1,
    it is most of what ESAM gains over SAM there, and SGD at twice the rate gains as much: docs/methods/sharpness.md.
    """

    class Config(TrainerConfig):
        rho: NonNegative = 0.05
        beta: Share = Field(0.6, description="probability that a parameter tensor is perturbed")
        gamma: Share = Field(0.5, description="share of a batch that the step is taken on")

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:  # noqa: ARG002
        weights = perturbation.trained(model)
        active = self.chosen(weights)  # outside of what is drawn twice, or all steps would draw alike
        with perturbation.same_draws(self.task.device):
            before = losses(model, batch)
            shift = perturbation.ascent(before.mean(), active, self.config.rho / self.config.beta)
        there = perturbation.moved(weights, shift)
        kept = self.most_sensitive(model, there, batch, before.detach())
        return perturbation.at(model, there, lambda moved: losses(moved, kept).mean())

    def chosen(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that this step perturbs, each with probability beta (section 3.1)."""
        if self.config.beta == 1:
            return dict(weights)
        drawn = torch.rand(len(weights)).lt(self.config.beta).tolist()
        return {name: weight for (name, weight), active in zip(weights.items(), drawn, strict=True) if active}

    def most_sensitive(self, model: nn.Module, there: Mapping[str, Tensor], batch: Batch, before: Tensor) -> Batch:
        """Return the examples whose loss rose most from ``before`` to the weights ``there`` (section 3.2)."""
        count = max(round(self.config.gamma * len(batch)), 1)
        if count == len(batch):
            return batch
        with torch.no_grad(), perturbation.same_draws(self.task.device):
            rise = perturbation.at(model, there, lambda moved: losses(moved, batch)) - before
        kept = rise.topk(count).indices
        return Batch({name: values[kept] for name, values in batch.fields.items()}, batch.index[kept])


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of every example, shape ``(n,)``."""
    each = F.cross_entropy(model(batch.x), batch.y, reduction="none")
    return each.flatten(1).mean(1) if each.dim() > 1 else each
