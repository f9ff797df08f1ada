"""LAME: leave the model alone, and make neighbours in feature space agree."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trellis_clients.edge.adapters._base import Adapter, Double, Options, log_softmax, normalised
from trellis_clients.edge.predictor import Array

Affinity = Literal["knn", "rbf", "linear"]


class Lame(Adapter):
    """Boudiaf et al., "Parameter-free Online Test-time Adaptation", CVPR 2022, equations 3 to 6.

    Of each batch, by itself, with the model's probabilities q and an affinity w of its features: minimise
    ``sum_i KL(y_i || q_i) - sum_ij w_ij y_i . y_j`` over probabilities y, by its concave bound. Nothing is carried to
    the next batch. The result is returned as ``log y``, whose softmax is y.

    Where it fails: it pays only where the labels of a batch are correlated (one class for a while, as in a video). On a
    shuffled stream neighbours of different classes are made to agree and accuracy falls: on corrupted digits by 4
    points with ``knn`` under a weak source and by 17 to 20 with ``rbf``, whose affinity has no end. Even on a sorted
    stream it gains nothing where the source has most of a batch wrong, since agreement spreads that
    (``benchmarks/claims/forward_only_tta.py``). With a batch of one ``knn`` does nothing.
    """

    class Config(Options):
        affinity: Affinity = Field(
            "knn",
            description="knn: 1 for each of the k nearest other examples; rbf: exp(-d^2/2s^2), s the mean distance to "
            "the k-th neighbour, an example being its own first; linear: the cosine",
        )
        neighbours: int = Field(5, ge=1, description="k")
        symmetric: bool = Field(False, description="average the affinity with its transpose")
        steps: int = Field(100, ge=1, description="most updates of a batch")

    name = "lame"
    config: Config
    _steps = 0

    def predict(self, x: NDArray[Any]) -> Array:
        """Answer a batch by the agreement of its neighbours."""
        c, prediction = self.config, self.forward(x)
        weights = affinity(normalised(prediction.features), c.affinity, c.neighbours, c.symmetric)
        log_y, self._steps = agree(log_softmax(prediction.logits), weights, c.steps)
        return log_y.astype(np.float32)

    def metrics(self) -> dict[str, float]:
        """Return the updates that the last batch took."""
        return {"steps": float(self._steps)}


def affinity(features: Double, kind: Affinity, neighbours: int, symmetric: bool) -> Double:
    """Return the affinity ``(n, n)`` of features ``(n, D)`` of length 1."""
    count = len(features)
    cosine = features @ features.T
    if kind == "linear":
        weights = cosine
    else:
        squares = np.square(features).sum(1)
        distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * cosine, 0))
        np.fill_diagonal(distances, 0)
        if kind == "knn":
            np.fill_diagonal(distances, np.inf)
            nearest = np.argsort(distances, axis=1, kind="stable")[:, : min(neighbours, count - 1)]
            weights = np.zeros((count, count))
            np.put_along_axis(weights, nearest, 1.0, axis=1)
        else:
            width = float(np.sort(distances, axis=1)[:, min(neighbours, count) - 1].mean())
            # k = 1 is every example's distance to itself: of no width, only equal ones attract.
            weights = np.exp(-(distances**2) / (2 * width**2)) if width > 0 else (distances == 0).astype(np.float64)
    return (weights + weights.T) / 2 if symmetric else weights


def agree(log_q: Double, weights: Double, steps: int = 100) -> tuple[Double, int]:
    """Minimise LAME's objective by its concave bound, all rows at once.

    Args:
        log_q: logarithm of the model's probabilities, ``(n, classes)``.
        weights: affinity ``(n, n)``.
        steps: most updates; it ends where the objective changes by less than 1e-8 of itself.

    Returns:
        ``log y``, ``(n, classes)``, and the number of updates.
    """
    log_q = np.log(np.exp(log_q) + 1e-10)
    log_y, before = log_softmax(log_q), np.inf
    for step in range(1, steps + 1):
        pull = weights @ np.exp(log_y)
        log_y = log_softmax(log_q + pull)
        y = np.exp(log_y)
        energy = float((y * (log_y - log_q - pull)).sum())
        if step > 2 and abs(energy - before) <= 1e-8 * abs(before):
            return log_y, step
        before = energy
    return log_y, steps
