"""``query.moments``: per-class count, mean and covariance of the features that enter the model's head.

What a calibration of the classifier needs of a client (Luo et al., NeurIPS 2021, section 4.2): for every local
class c with n examples, the mean of the features z and their unbiased covariance, which is zero for n = 1. The
extractor is the received global model in evaluation mode; nothing is augmented, and nothing is kept.

The reply's ArrayRecord ``moments`` holds, for m classes and D features, ``labels`` and ``counts`` (int64, ``(m,)``),
``means`` ``(m, D)`` and one of

- ``covariances`` ``(m, D, D)``: upload ``full``;
- ``triangles`` ``(m, D (D + 1) / 2)``, the upper triangle row by row: upload ``packed``;
- ``factors`` ``(m, r, D)`` and ``residuals`` ``(m, D)``: upload ``low-rank``. The covariance is about
  F^T F + diag(residual): its r largest eigenpairs, and the variances that these leave out. Exact where r reaches
  the covariance's rank, which is below n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trellis.data.base import ClientData, Split
from trellis.errors import PluginError
from trellis_clients.trainer import Metrics, State, Trainer, Turn, in_order

MOMENTS = "moments"
BATCH = 256
SENSITIVITY = math.sqrt(3)
"""How far one example moves (count, sum of z / C, sum of z z^T / C^2) where the norm of z is at most C: each part by 1
at most, and an example has one class."""


@dataclass(frozen=True)
class Moments:
    """Statistics of m classes: int64 ``labels`` and ``counts``, ``means`` ``(m, D)``, ``covariances`` ``(m, D, D)``."""

    labels: Tensor
    counts: Tensor
    means: Tensor
    covariances: Tensor


def answer(trainer: Trainer, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
    """Put the moments of the client's training examples into ``turn.reply`` as the message's config asks.

    Raises:
        PluginError: the model has no ``features`` and ``head``.
    """
    del state
    features, labels = extract(model, data.train)
    wish = turn.config
    least = int(wish.get("min-count", 1))
    if multiplier := float(wish.get("noise-multiplier", 0.0)):
        generator = turn.generator
        if not wish.get("seeded-noise", True):
            generator = torch.Generator()
            generator.seed()  # from the operating system: nobody can subtract this noise
        clip = float(wish["clip-norm"])
        found = noisy_moments(features, labels, trainer.task.num_classes, clip, multiplier, least, generator)
    else:
        found = moments(features, labels, least)
    turn.reply[MOMENTS] = encoded(found, wish)
    return {"classes": len(found.labels)}


@torch.no_grad()
def extract(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """Return features ``(n, D)`` and labels ``(n,)`` of a split on the CPU, the model in evaluation mode."""
    features: Any = getattr(model, "features", None)
    head: Any = getattr(model, "head", None)
    if not callable(features) or not isinstance(head, nn.Linear):
        raise PluginError(
            "model-head", f"{type(model).__name__} has no features(x) and linear head; moments are of what enters it"
        )
    model.eval()
    parts = [(features(batch.x).cpu(), batch.y.cpu()) for batch in in_order(split, BATCH)]
    if not parts:
        return torch.zeros(0, head.in_features), torch.zeros(0, dtype=torch.int64)
    return torch.cat([z for z, _ in parts]), torch.cat([y for _, y in parts])


def moments(features: Tensor, labels: Tensor, least: int = 1) -> Moments:
    """Return the moments of every class with at least ``least`` examples, in ascending order of labels."""
    found, counts = torch.unique(labels, return_counts=True)
    found = found[counts >= least]
    means, covariances = [], []
    for label in found:
        z = features[labels == label].double()
        mean = z.mean(0)
        centred = z - mean
        means.append(mean)
        covariances.append(centred.T @ centred / max(len(z) - 1, 1))
    return _stacked(found, counts[counts >= least], means, covariances, features.shape[1])


def noisy_moments(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    clip: float,
    multiplier: float,
    least: int,
    generator: torch.Generator,
) -> Moments:
    """Return moments under the Gaussian mechanism.

    Features are scaled down to a norm of at most ``clip``. Noise of deviation ``multiplier * sqrt(3)``, in units of
    1, clip and clip², goes onto the count, the sum and the sum of outer products of *every* class, present or not:
    that a class is absent is a secret too. What follows only reads the noisy values and costs no privacy: classes
    whose noisy count is below ``least`` (and 2, for a covariance) are dropped, means are kept within the clipping
    norm, and negative eigenvalues of a covariance become zero.
    """
    z = features.double()
    z = z * (clip / z.norm(dim=1, keepdim=True).clamp(min=clip))
    size = z.shape[1]
    deviation = multiplier * SENSITIVITY

    def noise(*shape: int) -> Tensor:
        return deviation * torch.randn(*shape, generator=generator, dtype=torch.float64)

    found, counts, means, covariances = [], [], [], []
    for label in range(num_classes):
        own = z[labels == label]
        # One draw per entry of the upper triangle, mirrored: the matrix that is sent is symmetric.
        upper = torch.triu(noise(size, size))
        count = len(own) + float(noise(1))
        total = own.sum(0) + clip * noise(size)
        outer = own.T @ own + clip**2 * (upper + torch.triu(upper, 1).T)
        if round(count) < max(least, 2):
            continue
        mean = total / count
        mean = mean * (clip / mean.norm().clamp(min=clip))
        values, vectors = torch.linalg.eigh((outer - count * torch.outer(mean, mean)) / (count - 1))
        found.append(label)
        counts.append(round(count))
        means.append(mean)
        covariances.append((vectors * values.clamp(min=0)) @ vectors.T)
    return _stacked(torch.tensor(found), torch.tensor(counts), means, covariances, size)


def encoded(found: Moments, wish: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return moments as the arrays of an upload; ``wish`` has ``upload``, ``rank`` and ``precision``."""
    upload = str(wish.get("upload", "packed"))
    dtype = torch.float64 if wish.get("precision") == "float64" else torch.float32
    size = found.means.shape[1]
    arrays = {"labels": found.labels.long(), "counts": found.counts.long(), "means": found.means.to(dtype)}
    if upload == "full":
        arrays["covariances"] = found.covariances.to(dtype)
    elif upload == "packed":
        rows, columns = torch.triu_indices(size, size)
        arrays["triangles"] = found.covariances[:, rows, columns].to(dtype)
    elif upload == "low-rank":
        factors, residuals = low_rank(found.covariances, min(int(wish["rank"]), size))
        arrays |= {"factors": factors.to(dtype), "residuals": residuals.to(dtype)}
    else:
        raise PluginError("query-moments", f"no upload of moments is called {upload!r}")
    return arrays


def low_rank(covariances: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors ``(m, rank, D)`` and the variances they leave out ``(m, D)`` of covariances ``(m, D, D)``."""
    values, vectors = torch.linalg.eigh(covariances)  # ascending
    scaled = vectors[..., -rank:] * values[..., -rank:].clamp(min=0).sqrt().unsqueeze(-2)
    residuals = covariances.diagonal(dim1=-2, dim2=-1) - scaled.square().sum(-1)
    return scaled.mT.contiguous(), residuals.clamp(min=0)


def _stacked(labels: Tensor, counts: Tensor, means: list[Tensor], covariances: list[Tensor], size: int) -> Moments:
    if not means:
        empty = torch.zeros(0, dtype=torch.int64)
        return Moments(empty, empty, torch.zeros(0, size).double(), torch.zeros(0, size, size).double())
    return Moments(labels, counts, torch.stack(means), torch.stack(covariances))
