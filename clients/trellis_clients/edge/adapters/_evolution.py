"""The CMA-ES of the library ``cma`` as a value: draws by seed and generation, and a state of plain arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cma
import numpy as np
from cma.sigma_adaptation import CMAAdaptSigmaCSA
from cma.utilities.utils import ElapsedWCTime
from numpy.typing import NDArray

from trellis_clients.edge.adapters._base import Double, Reader, State

CONDITION = 1e14
"""Condition number of the covariance from which on the library's own rules call a search over."""

SPAN = 1e6
"""A search whose longest axis left ``[sigma / SPAN, sigma * SPAN]`` has collapsed or run away."""


def population(dimension: int) -> int:
    """Return the usual population for a dimension, ``4 + floor(3 ln dimension)``."""
    return 4 + int(3 * math.log(dimension))


class Evolution:
    """Covariance matrix adaptation (Hansen, arXiv 1604.00772) around a mean that starts at zero.

    The library reads random numbers from where it is told to: here, in each generation, from a generator that depends
    on the seed and the generation's number alone. No process-wide generator is read or seeded. A search that is over
    (its distribution has collapsed, run away or become degenerate) starts anew around its mean; on a stream there is no
    end at which one could look at the library's stopping rules.

    Args:
        dimension: of a point.
        sigma: first step size.
        size: points per generation; None for ``population(dimension)``.
        seed: of all draws.
    """

    def __init__(self, dimension: int, sigma: float, size: int | None, seed: int) -> None:
        self.dimension, self.sigma, self.seed = dimension, sigma, seed
        self.size = population(dimension) if size is None else size
        self.generation = 0
        self._search = self._started(np.zeros(dimension))

    @property
    def mean(self) -> Double:
        """Where the search stands, ``(dimension,)``."""
        return np.array(self._search.mean)

    @property
    def step(self) -> float:
        """The step size."""
        return float(self._search.sigma)

    def ask(self) -> list[Double]:
        """Draw this generation's points. Asking again before ``tell`` gives the same ones."""
        self._draws = np.random.default_rng((self.seed, self.generation))
        return [np.array(point) for point in self._search.ask()]

    def tell(self, points: Sequence[Double], values: Sequence[float]) -> None:
        """Move the search by the points' ranks, lowest value first. Points not asked for may be among them."""
        self._search.tell([point.copy() for point in points], list(values))  # it writes to points it does not know
        self.generation += 1
        search = self._search
        longest = search.sigma * float(search.sm.D.max())
        if search.sm.condition_number > CONDITION or not 1 / SPAN < longest / self.sigma < SPAN:
            self._search = self._started(search.mean)

    def state(self) -> State:
        """Return mean, step size, covariance, its factors (they lag behind it), paths and counters."""
        search, sampler = self._search, self._search.sm
        return {
            "mean": search.mean.copy(),
            "sigma": float(search.sigma),
            "path_c": search.pc.copy(),
            "path_sigma": search.adapt_sigma.ps.copy(),
            "covariance": sampler.C.copy(),
            "axes": sampler.B.copy(),
            "lengths": sampler.D.copy(),
            "generation": self.generation,
            "updates": int(search.countiter),
            "factored": int(sampler.last_update),
        }

    def load_state(self, reader: Reader) -> None:
        """Go on from a state; its draws follow from the generation."""
        n = self.dimension
        search = self._started(reader.array("mean", (n,)))
        sampler = search.sm
        search.sigma = reader.number("sigma", 0)
        search.pc = reader.array("path_c", (n,))
        search.adapt_sigma.ps = reader.array("path_sigma", (n,))
        sampler.C = reader.array("covariance", (n, n))
        sampler.B = reader.array("axes", (n, n))
        sampler.D = reader.array("lengths", (n,))
        generation = reader.count("generation")
        search.countiter = sampler.count_tell = reader.count("updates")
        sampler.last_update = reader.count("factored")
        search._updateBDfromSM(sampler)
        search.mean_old = search.mean
        search.timer = ElapsedWCTime()
        self._search, self.generation = search, generation

    def _started(self, mean: NDArray[Any]) -> Any:
        options = {
            "popsize": self.size,
            "randn": lambda *shape: self._draws.standard_normal(shape),
            "seed": np.nan,  # leave NumPy's own generator alone
            "verbose": -9,  # no output, no log files
            "CMA_mirrors": 0,  # below six points the library would keep mirrored ones for the next generation
            # From 300 dimensions on the library would add two points along the last step, and needs them told first.
            "AdaptSigma": CMAAdaptSigmaCSA,
            "conditioncov_alleviate": False,  # would move the covariance into attributes that are no part of the state
        }
        return cma.CMAEvolutionStrategy(np.array(mean, np.float64), self.sigma, options)
