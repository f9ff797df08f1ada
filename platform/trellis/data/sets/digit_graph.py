"""The bundled digits as nodes of a made-up graph."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from trellis import seeding
from trellis.data.base import DataSet, Split
from trellis.data.sets._base import Source, held_out, standardized
from trellis.registry import register
from trellis.scenario import Strict


@register("datasets", "digit-graph", summary="handwritten digits, linked by a made-up block model", kind="graph")
class DigitGraph(Source):
    """1797 handwritten digits (scikit-learn's) as nodes; edges drawn from a stochastic block model.

    Real: the images and their labels, and which of them are held out. Made up: the noise on the pixels, which leaves a
    single image hard to read; the edges; and the communities. A node has ``degree`` neighbours on average, of which a
    share ``homophily`` show the same digit and a share ``inside`` are of the same community; both are independent of
    each other and of everything in the images. So neighbours tell what a noisy image does not, and by how much is set,
    not found. Everything made follows from the run's seed.

    An example is a node: ``x`` is ``(n, 64)``, ``y`` its digit. ``facts["edges"]`` is ``(2, E)``, int64: pairs of row
    numbers of ``fields``, each edge in both directions, none twice. The held-out nodes are a graph of their own,
    without an edge to the others and without communities. The community is the natural id, so that clients dealt by
    ``natural-id`` hold subgraphs with few edges between them; other ways to deal lose more of them.
    """

    class Config(Strict):
        communities: int = Field(4, ge=1)
        degree: float = Field(8.0, gt=0, description="neighbours a node on average")
        homophily: float = Field(0.7, ge=0, le=1, description="share of them with the same digit")
        inside: float = Field(0.9, ge=0, le=1, description="share of them in the same community")
        noise: float = Field(2.0, ge=0, description="deviation added to pixels of deviation 1")
        test_fraction: float = Field(0.2, ge=0, lt=1, description="held out; the same examples for every seed")

    config: Config

    def load(self, seed: int) -> DataSet:
        from sklearn.datasets import load_digits

        digits, generator = load_digits(), seeding.numpy_generator(seed, "digit-graph")
        train, test = held_out(digits.target, self.config.test_fraction)
        pixels = torch.from_numpy(digits.data.astype(np.float32))
        (first, second), _ = standardized(pixels[train], [pixels[test]], on=True, by_channel=False)
        x = torch.empty(len(pixels), 64)
        x[train], x[test] = first, second
        x += self.config.noise * torch.from_numpy(generator.standard_normal(x.shape, dtype=np.float32))
        community = generator.permutation(np.arange(len(train)) % self.config.communities)
        edges = [
            train[self._edges(digits.target[train], community, self.config.communities, generator)],
            test[self._edges(digits.target[test], np.zeros(len(test), np.int64), 1, generator)],
        ]
        fields = {"x": x, "y": torch.from_numpy(digits.target.astype(np.int64))}
        return DataSet(
            kind="graph",
            train=Split(fields, torch.from_numpy(train)),
            test=Split(fields, torch.from_numpy(test)),
            classes=tuple(map(str, range(10))),
            natural_id=[f"community-{number}" for number in community],
            facts={"edges": torch.from_numpy(np.concatenate(edges, axis=1))},
        )

    def _edges(
        self, y: NDArray[np.int64], community: NDArray[np.int64], communities: int, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """Draw a graph of ``(n,)`` nodes: ``(2, E)`` pairs of positions."""
        if not len(y):
            return np.empty((2, 0), np.int64)
        share = np.bincount(y) / len(y)
        same_class = share[y][:, None]
        same = y[:, None] == y
        rate = (
            self.config.degree
            / len(y)
            * np.where(same, self.config.homophily / same_class, (1 - self.config.homophily) / (1 - same_class))
        )
        if communities > 1:
            near = community[:, None] == community
            rate = rate * np.where(near, self.config.inside, (1 - self.config.inside) / (communities - 1)) * communities
        rate = (rate + rate.T) / 2  # classes are not quite of one size
        upper = np.triu(generator.random(rate.shape) < rate, 1)
        a, b = np.nonzero(upper)
        return np.stack([np.concatenate([a, b]), np.concatenate([b, a])])
