"""Which samples a CEMA edge uploads: two entropy thresholds, and a budget of bytes where the link has one.

In NumPy for devices without torch. The torch trainer takes its arithmetic from here
(``trainers/cloud_edge/_selection.py``), so that both edges choose alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def entropy(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Return the Shannon entropy in nats of the softmax of logits ``(n, classes)``; shape ``(n,)``."""
    log = log_softmax(logits)
    found: NDArray[np.float32] = -(np.exp(log) * log).sum(1)
    return found


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Return the logarithm of the softmax over the last axis, float32."""
    below = np.asarray(logits, np.float32) - logits.max(-1, keepdims=True)
    result: NDArray[np.float32] = below - np.log(np.exp(below).sum(-1, keepdims=True))
    return result


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

    def observe(self, total: float, count: int) -> tuple[float, float]:
        """Remember a batch by the sum of its entropies; return E_min and E_max to judge it by, in nats."""
        before = self.mean
        self.seen += count
        self.total += total
        if math.isnan(self.e_max):
            self.e_max = self.high * math.log(self.classes)
        elif before > 0:  # a model that was certain of everything so far gives no scale to follow
            self.e_max *= self.decay * self.mean / before
        return self.low * math.log(self.classes), self.e_max

    def keep(self, entropies: NDArray[Any]) -> NDArray[np.bool_]:
        """Return a boolean mask over a batch's entropies, and remember them."""
        low, high = self.observe(float(entropies.sum(dtype=np.float64)), len(entropies))
        kept: NDArray[np.bool_] = (entropies < high) & (entropies > low)
        return kept

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

    def most(self, sample_bytes: int, hours: float) -> int | None:
        """Save up for a batch that took ``hours``; return how many samples can be paid for. None: no limit."""
        if self.bytes_per_hour is None:
            return None
        self.saved = min(self.saved + self.bytes_per_hour * hours, self.bytes_per_hour)
        return int(self.saved // sample_bytes)

    def spend(self, samples: int, sample_bytes: int) -> None:
        """Pay for samples that go."""
        self.saved -= samples * sample_bytes

    def afford(
        self, candidates: NDArray[np.intp], entropies: NDArray[Any], sample_bytes: int, hours: float
    ) -> NDArray[np.intp]:
        """Return the positions, ascending, of the candidates that may go.

        Args:
            candidates: positions of the samples that survived the thresholds.
            entropies: of the whole batch.
            sample_bytes: what one upload costs.
            hours: stream time that this batch took.
        """
        most = self.most(sample_bytes, hours)
        if most is None:
            return candidates
        surest = candidates[np.argsort(entropies[candidates], kind="stable")[:most]]
        self.spend(len(surest), sample_bytes)
        return np.sort(surest)
