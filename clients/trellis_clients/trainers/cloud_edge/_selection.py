"""CEMA's selection over torch tensors: the arithmetic is the torch-free edge's, so that both choose alike."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_clients.edge import selection


class Thresholds(selection.Thresholds):
    """The two entropy thresholds, for a tensor of entropies on any device."""

    def keep(self, entropies: Tensor) -> Tensor:  # type: ignore[override]
        """Return a boolean mask over a batch's entropies, and remember them."""
        low, high = self.observe(float(entropies.double().sum()), len(entropies))
        return (entropies < high) & (entropies > low)


class Budget(selection.Budget):
    """The budget of bytes, for tensors on any device."""

    def afford(self, candidates: Tensor, entropies: Tensor, sample_bytes: int, hours: float) -> Tensor:  # type: ignore[override]
        """Return the positions, ascending, of the candidates that may go; arguments as in the base class."""
        most = self.most(sample_bytes, hours)
        if most is None:
            return candidates
        surest = candidates[torch.argsort(entropies[candidates], stable=True)[:most]]
        self.spend(len(surest), sample_bytes)
        return surest.sort().values
