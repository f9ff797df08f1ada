"""How sharp a minimum is: the Hessian's largest eigenvalue, and how far the loss rises in a small ball of weights.

Both are of an objective: a function from the model to a scalar, such as the mean loss on a data set. They are of the
model in evaluation mode, which leaves it as it was. For figures that can be compared give a model and data in double
precision (``copy.deepcopy(model).double()``): second derivatives lose digits, and Lanczos builds on them.

Neither is invariant: rescaling the weights of two ReLU layers against each other changes both and no output (Dinh et
al., ICML 2017). Compare models of one architecture that were trained alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

Objective = Callable[[nn.Module], Tensor]

TINY = 1e-12


def top_eigenvalue(model: nn.Module, objective: Objective, tolerance: float = 1e-4) -> float:
    """Return the largest eigenvalue of the objective's Hessian by the trained weights, by Lanczos iteration.

    The Hessian is never formed: every iteration differentiates the product of gradient and vector. With data in one
    batch this takes the memory of about two backward passes.

    Args:
        model: with at least two trained weights.
        objective: twice differentiable; of a piecewise linear network almost everywhere.
        tolerance: relative accuracy of the eigenvalue.

    Raises:
        scipy.sparse.linalg.ArpackNoConvergence: the iteration did not get there.
    """
    weights = _trained(model)
    size = sum(weight.numel() for weight in weights)
    with _evaluating(model):
        gradient = _flat(torch.autograd.grad(objective(model), weights, create_graph=True, materialize_grads=True))

        def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
            direction = torch.from_numpy(vector.ravel()).to(gradient)
            if not gradient.requires_grad:  # of a linear objective
                return np.zeros(size)
            found = torch.autograd.grad(gradient @ direction, weights, retain_graph=True, materialize_grads=True)
            return _flat(found).double().cpu().numpy()

        hessian = LinearOperator((size, size), matvec=product, dtype=np.float64)
        # A start of our own: ARPACK's is drawn from a generator that nobody seeds.
        start = np.random.default_rng(0).standard_normal(size)
        if not product(start).any():  # flat in a direction that nobody chose: flat in all, where ARPACK cannot start
            return 0.0
        values = eigsh(hessian, k=1, which="LA", v0=start, tol=tolerance, return_eigenvectors=False)
    return float(values[0])


def loss_rise(model: nn.Module, objective: Objective, radius: float, steps: int = 1) -> float:
    """Return how far the objective rises from the model's weights w within a ball of them.

    With one step it is SAM's first-order measure (Foret et al., ICLR 2021, equation 2), the rise at
    w + radius · g / ‖g‖. With more it is the largest rise on a projected gradient ascent of so many steps of length
    2 · radius / steps: a lower bound of the largest rise in the ball.

    Args:
        model: its weights are moved and put back, to the bit.
        objective: differentiable.
        radius: of the ball, in the Euclidean norm over all trained weights together.
        steps: gradients to take.
    """
    weights = _trained(model)
    origin = [weight.detach().clone() for weight in weights]
    best = -float("inf")
    with _evaluating(model):
        try:
            loss = start = objective(model)
            shift = torch.zeros_like(_flat(origin))
            for _ in range(steps):
                gradient = _flat(torch.autograd.grad(loss, weights, materialize_grads=True))
                shift = shift + 2 * radius / steps * gradient / (gradient.norm() + TINY)
                shift = shift * (radius / shift.norm().clamp(min=radius))
                _move(weights, origin, shift)
                loss = objective(model)
                best = max(best, float(loss.detach() - start.detach()))
        finally:
            _move(weights, origin, None)
    return best


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def _move(weights: Sequence[Tensor], origin: Sequence[Tensor], shift: Tensor | None) -> None:
    """Set the weights to the origin, plus a flat shift if there is one."""
    offset = 0
    for weight, place in zip(weights, origin, strict=True):
        weight.copy_(place)
        if shift is not None:
            weight += shift[offset : offset + weight.numel()].view_as(weight)
        offset += weight.numel()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
