"""Which samples a CEMA edge uploads: two entropy thresholds, and a budget of bytes where the link has one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Thresholds:
    """Dynamic exclusion of unreliable and low-informative samples (CEMA, section 3.1).

    A sample is kept if ``E_min < E(x) < E_max``. ``E_max`` follows the mean entropy of all samples seen so far::

        E_max^t = decay * E_max^(t-1) * E_avg^t / E_avg^(t-1),    E_max^0 = high * ln C

    The first batch has no mean before it, so it is judged by ``E_max^0``.

    Args:
        classes: C.
        high: E_max^0 in units of ln C; infinity keeps every sample above ``low``.
        low: E_min in units of ln C; below zero switches it off.
        decay: lambda; it compounds with every batch.
    """

    classes: int
    high: float
    low: float
    decay: float
    seen: int = 0
    total: float = 0.0
    e_max: float = math.nan

    def keep(self, entropies: Tensor) -> Tensor:
        """Return a boolean mask over a batch's entropies, and remember them."""
        before = self.mean
        self.seen += len(entropies)
        self.total += float(entropies.double().sum())
        if math.isnan(self.e_max):
            self.e_max = self.high * math.log(self.classes)
        elif before > 0:  # a model that was certain of everything so far gives no scale to follow
            self.e_max *= self.decay * self.mean / before
        return (entropies < self.e_max) & (entropies > self.low * math.log(self.classes))

    @property
    def mean(self) -> float:
        """Mean entropy of all samples seen so far, E_avg."""
        return self.total / self.seen if self.seen else 0.0

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen, "total": self.total, "e_max": self.e_max}

    def load_state(self, state: dict[str, Any]) -> None:
        self.seen, self.total, self.e_max = state["seen"], state["total"], state["e_max"]


@dataclass
class Budget:
    """Bytes per hour of stream time that may be uploaded, as a bucket that starts empty and holds one hour's worth.

    Where more samples survive the thresholds than it pays for, those of lowest entropy go first: the cloud's
    losses weight a sample by ``exp(E_max - E)``, so they count most. The others are dropped, not kept for later.
    """

    bytes_per_hour: float | None
    saved: float = 0.0

    def afford(self, candidates: Tensor, entropies: Tensor, sample_bytes: int, hours: float) -> Tensor:
        """Return the positions, ascending, of the candidates that may go.

        Args:
            candidates: positions of the samples that survived the thresholds.
            entropies: of the whole batch.
            sample_bytes: what one upload costs.
            hours: stream time that this batch took.
        """
        if self.bytes_per_hour is None:
            return candidates
        self.saved = min(self.saved + self.bytes_per_hour * hours, self.bytes_per_hour)
        most = int(self.saved // sample_bytes)
        surest = candidates[torch.argsort(entropies[candidates], stable=True)[:most]]
        self.saved -= len(surest) * sample_bytes
        return surest.sort().values
