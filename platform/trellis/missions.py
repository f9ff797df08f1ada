"""Who sees which classes when: the missions of federated reconnaissance (Hendryx et al., 2021, section 3).

Classes are split into base classes, which the cloud knows beforehand, and field classes, which clients find on
their missions: every mission shows every client a few field classes and a few images of each. Clients may see
the same class, in one mission or in different ones, but no client sees one of its images twice.

A schedule is a pure function of its configuration, the number of classes and the run's seed, so cloud and
clients work it out alike and nothing of it travels.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trellis import seeding
from trellis.errors import ScenarioError
from trellis.scenario import Strict

Label = Annotated[int, Field(ge=0)]
Labels = Annotated[tuple[Label, ...], Field(min_length=1)]


class Missions(Strict):
    """What the scenario says of missions."""

    base_classes: Annotated[int, Field(ge=1)] | Labels | None = Field(
        None, description="how many classes from the first on, or which; by default the first half"
    )
    classes_per_mission: int = Field(2, ge=1, description="field classes a client is shown on one mission")
    images_per_class: int = Field(10, ge=1, description="images of each; fewer where the client has no more unseen")
    visits: Annotated[tuple[tuple[Labels, ...], ...], Field(min_length=1)] | None = Field(
        None, description="classes by mission and client in place of a draw; after the last mission it starts over"
    )


class Schedule:
    """The missions of one run.

    Missions are numbered from 1, clients from 0.

    Attributes:
        base: labels of the base classes, rising.
        field: labels of all others, rising.

    Raises:
        ScenarioError: the classes named do not exist, or too few are left for a mission.
    """

    def __init__(self, config: Missions, num_classes: int, seed: int) -> None:
        self.config = config
        self.seed = seed
        self._drawn: dict[tuple[int, int], tuple[int, ...]] = {}
        base = config.base_classes
        if base is None:
            base = num_classes // 2
        self.base = tuple(range(base)) if isinstance(base, int) else tuple(sorted(set(base)))
        if not self.base or self.base[-1] >= num_classes:
            raise ScenarioError(
                "missions-base",
                f"missions.base_classes is {config.base_classes!r}, but there are {num_classes} classes,"
                f" 0 to {num_classes - 1}",
            )
        self.field = tuple(sorted(set(range(num_classes)) - set(self.base)))
        if config.visits is None and config.classes_per_mission > len(self.field):
            raise ScenarioError(
                "missions-field",
                f"missions.classes_per_mission is {config.classes_per_mission}, but beside {len(self.base)} base"
                f" classes there are only {len(self.field)}",
            )
        for label in (label for mission in config.visits or () for labels in mission for label in labels):
            if label >= num_classes:
                raise ScenarioError(
                    "missions-visits",
                    f"missions.visits names class {label}; the {num_classes} classes are 0 to {num_classes - 1}",
                )

    def classes(self, mission: int, client: int) -> tuple[int, ...]:
        """Return the labels that a mission shows a client, rising."""
        assert mission >= 1 and client >= 0, (mission, client)
        key = mission, client
        if key not in self._drawn:
            self._drawn[key] = self._draw(mission, client)
        return self._drawn[key]

    def _draw(self, mission: int, client: int) -> tuple[int, ...]:
        if self.config.visits is not None:
            lists = self.config.visits[(mission - 1) % len(self.config.visits)]
            return tuple(sorted(set(lists[client % len(lists)])))
        generator = seeding.numpy_generator(self.seed, "mission", mission, client)
        drawn = generator.choice(self.field, self.config.classes_per_mission, replace=False)
        return tuple(sorted(map(int, drawn)))

    def own(self, mission: int, client: int) -> frozenset[int]:
        """Return the labels that a client has been shown up to and with a mission; none for mission 0."""
        return frozenset(label for past in range(1, mission + 1) for label in self.classes(past, client))

    def images(self, labels: NDArray[Any], mission: int, client: int) -> NDArray[np.int64]:
        """Return the positions of the images that a mission shows a client.

        Args:
            labels: of all training images that the client holds, ``(n,)``.
            mission: which mission.
            client: which client.

        Returns:
            Rising positions, int64: of each class up to ``images_per_class`` that no earlier mission took.
        """
        size, taken = self.config.images_per_class, []
        for label in self.classes(mission, client):
            before = sum(label in self.classes(past, client) for past in range(1, mission))
            order = seeding.numpy_generator(self.seed, "images", client, label).permutation(
                np.flatnonzero(labels == label)
            )
            taken.append(order[before * size : (before + 1) * size])
        return np.sort(np.concatenate(taken)).astype(np.int64)
