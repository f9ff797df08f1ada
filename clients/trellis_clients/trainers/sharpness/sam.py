"""SAM: descend from the worst point in a small ball of weights."""

from __future__ import annotations

from torch import Tensor, nn

from trellis.data.base import Batch
from trellis.registry import register
from trellis_clients.trainer import NonNegative, Trainer, TrainerConfig, Turn
from trellis_clients.trainers.sharpness import _perturbation as perturbation


@register(
    "trainers",
    "sam",
    paper="Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, ICLR 2021",
    takes=("image", "vector", "tokens", "series", "points"),
    sends="weights",
)
class Sam(Trainer):
    """SAM (Algorithm 1): the gradient of every step is taken at w + eps, eps = rho · g / ‖g‖ (equation 2 with p = 2).

    g is the gradient of the same batch at w, its norm over all trained weights together; eps is held constant.
    Momentum, weight decay and clipping act on the second gradient, at w. Both passes see the same dropout masks, and
    only the first updates batch norm's running statistics. The reported loss is the objective, the one at w + eps.

    The default rho is the paper's. On a client the ball is around its own weights and of its own data: what SAM
    flattens is the local loss. Measured on digits over twenty rounds, that is the average's too without skew (top
    eigenvalue 0.64 of SGD's), and hardly under Dirichlet 0.1 (0.89, with 1.3 points less accuracy):
    docs/methods/sharpness.md.
    """

    class Config(TrainerConfig):
        rho: NonNegative = 0.05

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:
        weights = perturbation.trained(model)
        with perturbation.same_draws(self.task.device):
            shift = perturbation.ascent(super().loss(model, batch, turn), weights, self.config.rho)
        plain = super().loss
        return perturbation.at(model, perturbation.moved(weights, shift), lambda there: plain(there, batch, turn))
