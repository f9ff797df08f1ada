"""What the Gaussian mechanism costs in privacy."""

from __future__ import annotations

import math


def delta(epsilon: float, multiplier: float) -> float:
    """Return the smallest delta at which noise of ``multiplier`` times the L2 sensitivity is (epsilon, delta)-private.

    Balle and Wang, Improving the Gaussian Mechanism for Differential Privacy, ICML 2018, theorem 8; exact.
    """
    ratio = 1 / multiplier
    tail = _normal(-ratio / 2 - epsilon / ratio)
    return _normal(ratio / 2 - epsilon / ratio) - (math.exp(epsilon + math.log(tail)) if tail else 0.0)


def epsilon(multiplier: float, at_delta: float) -> float:
    """Return the smallest epsilon at which the mechanism is (epsilon, at_delta)-private, rounded up by at most 1e-9."""
    if delta(0.0, multiplier) <= at_delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta(high, multiplier) > at_delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * max(high, 1.0):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle, multiplier) > at_delta else (low, middle)
    return high


def _normal(x: float) -> float:
    """Return the standard normal distribution function."""
    return math.erfc(-x / math.sqrt(2)) / 2
