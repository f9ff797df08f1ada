"""Random walks through a small house of two rooms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from trellis import seeding
from trellis.data.base import DataSet, Split
from trellis.data.sets._base import Source
from trellis.errors import DataError
from trellis.registry import register
from trellis.scenario import Strict

MOVES = ((0, 1), (0, -1), (1, 0), (-1, 0))


@register(
    "datasets", "gridworld", summary="made-up random walks through two rooms with a door between", kind="transitions"
)
class Gridworld(Source):
    """Episodes of a uniform random policy on a grid of ``height`` x ``width`` with one wall and a door in it.

    All of it is made up; nothing here was recorded from anything. The four moves are equally likely, and one that
    would leave the grid or enter the wall stays where it is. So the chance of a step does not depend on its direction,
    and walks that start anywhere alike are everywhere equally often. The map has no symmetry unless it is given one
    (a wall in the middle column), as symmetric maps have repeated eigenvalues. Walks follow from the run's seed.

    An example is an episode: ``x`` is ``(n, length + 1)``, the numbers of the states it went through, int64. Episodes
    start in one of ``regions`` bands of columns, as often as the band has states, at any of its states; that band is
    the natural id (``region-0``, ...), so that clients dealt by ``natural-id`` know different parts of one world.

    ``facts``: ``positions``, ``(states, 2)``, row and column of each state; ``visits``, ``(states,)``, how often a step
    of the training episodes starts there; ``steps``, ``(states, states)``, how often it leads where.
    """

    class Config(Strict):
        height: int = Field(5, ge=1, le=64)
        width: int = Field(6, ge=2, le=64)
        wall: int | None = Field(2, description="column of the wall; null for one room")
        door: int = Field(4, ge=1, description="free cells in the wall, from the top")
        regions: int = Field(3, ge=1, description="bands of columns that episodes start in")
        episodes: int = Field(300, ge=1)
        test_episodes: int = Field(100, ge=0)
        length: int = Field(20, ge=1, description="steps an episode")

    config: Config

    def load(self, seed: int) -> DataSet:
        c = self.config
        positions = self.positions()
        follow = successors(positions)
        generator = seeding.numpy_generator(seed, "gridworld")
        train, starts = self._walks(positions, follow, c.episodes, generator)
        test, _ = self._walks(positions, follow, c.test_episodes, generator)
        steps = np.zeros((len(positions), len(positions)), np.int64)
        np.add.at(steps, (train[:, :-1].ravel(), train[:, 1:].ravel()), 1)
        if not steps.any(1).all():
            raise DataError(
                "gridworld-visits",
                f"{c.episodes} episodes of {c.length} steps never leave {int((~steps.any(1)).sum())} of "
                f"{len(positions)} states; raise data.episodes or data.length",
            )
        return DataSet(
            kind="transitions",
            train=Split.whole(x=torch.from_numpy(train)),
            test=Split.whole(x=torch.from_numpy(test)),
            natural_id=[f"region-{region}" for region in starts],
            facts={"positions": positions, "visits": steps.sum(1), "steps": steps},
        )

    def positions(self) -> NDArray[np.int64]:
        """Return row and column of every state, ``(states, 2)``.

        Raises:
            DataError: the wall or its door is outside the grid, or there are fewer columns than regions.
        """
        c = self.config
        if c.wall is not None and not (0 < c.wall < c.width - 1 and c.door <= c.height):
            raise DataError(
                "gridworld-map",
                f"data.wall is {c.wall} and data.door {c.door}; in a grid of {c.height} x {c.width} the wall has room "
                f"in columns 1 to {c.width - 2}, and the door is 1 to {c.height} cells wide",
            )
        if c.regions > c.width:
            raise DataError("gridworld-map", f"data.regions is {c.regions}, but there are only {c.width} columns")
        cells = [(row, column) for row in range(c.height) for column in range(c.width)]
        return np.array([(row, column) for row, column in cells if column != c.wall or row < c.door])

    def _walks(
        self, positions: NDArray[np.int64], follow: NDArray[np.int64], count: int, generator: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return episodes ``(count, length + 1)`` and the region each starts in."""
        regions = positions[:, 1] * self.config.regions // self.config.width
        states = np.empty((count, self.config.length + 1), np.int64)
        # Every state is a start equally often, but for the last few.
        states[:, 0] = generator.permutation(np.arange(count) % len(positions))
        for step in range(self.config.length):
            moves = generator.integers(len(MOVES), size=count)
            states[:, step + 1] = follow[states[:, step], moves]
        return states, regions[states[:, 0]]


def successors(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the state that each of the four moves leads to, ``(states, 4)``; a blocked one stays."""
    number: dict[Any, int] = {tuple(place): state for state, place in enumerate(positions.tolist())}
    return np.array(
        [
            [number.get((row + down, column + right), here) for down, right in MOVES]
            for (row, column), here in number.items()
        ]
    )
