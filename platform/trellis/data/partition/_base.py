"""What every partitioner shares: checks, Flower's partitioners at work, and each client's own test split.

A bundled partitioner names its knobs and makes one of ``flwr_datasets.partitioner``; the rest is here. Its
``min_examples`` counts a client's examples before its own test split is taken off.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trellis import seeding
from trellis.data.base import DataSet, Federation
from trellis.errors import DataError
from trellis.registry import info_of
from trellis.scenario import Strict

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Deal:
    """What one of Flower's partitioners is made for: so many rows for so many clients, by a seed below 2**32."""

    rows: int
    clients: int
    seed: int


class PartitionConfig(Strict):
    """What every partitioner can be told."""

    test_fraction: float = Field(0.2, ge=0, le=0.9, description="share of a client's examples kept for its own test")
    min_examples: int = Field(1, ge=0, description="a client with fewer is an error")


class Partitioner(ABC):
    """Deals a data set out to clients: disjoint, the same for the same seed, and complete unless its file says so.

    Attributes:
        knobs: keys of the scenario that a user would turn when a client is left without examples.
        labelled: whether the labels decide who gets what.
    """

    knobs: ClassVar[tuple[str, ...]] = ("clients",)
    labelled: ClassVar[bool] = False
    config: PartitionConfig

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def flower(self, deal: Deal) -> Any:
        """Return the partitioner of ``flwr_datasets`` that does the dealing; it may go by the columns label and id."""

    def count(self, data: DataSet, clients: int | None) -> int:
        """Return the number of clients. Those that read it off the data override this."""
        del data
        if clients is None:
            raise DataError("clients-missing", f"clients is missing; {self.name} needs the number of clients")
        return clients

    @property
    def name(self) -> str:
        """How errors call this partitioner."""
        return f"partition {info_of(type(self)).name!r}"

    def deal(self, data: DataSet, clients: int | None, seed: int) -> Federation:
        """Deal the training examples out.

        Args:
            data: the data set; of kind ``none`` every client gets an empty split, in constant memory.
            clients: how many clients, or None where the data say it.
            seed: the run's seed.

        Raises:
            DataError: the number of clients is missing or does not fit, labels are missing, or a client is left
                with fewer than ``min_examples``.
        """
        if data.kind == "none":
            if clients is None:
                raise DataError("clients-missing", "clients is missing; data without examples do not say how many")
            return Federation(data, Empties(clients), Empties(clients))
        clients = self.count(data, clients)
        least = self.config.min_examples
        if clients * max(least, 1) > len(data.train):
            raise DataError(
                "partition-clients",
                f"{self.name}: {clients} clients with at least {max(least, 1)} examples each need"
                f" {clients * max(least, 1)} training examples; the data have {len(data.train)}",
            )
        if self.labelled and not _has_labels(data):
            raise DataError("partition-labels", f"{self.name} goes by class labels, which these data do not have")
        parts = self.parts(data, clients, seed)
        for client, part in enumerate(parts):
            if len(part) < least:
                raise DataError(
                    "partition-empty",
                    f"{self.name}: client {client} of {clients} has {len(part)} of {len(data.train)} examples, and"
                    f" min_examples is {least}; change {' or '.join(self.knobs)}",
                )
        pairs = [self._own_test(part, seed, client) for client, part in enumerate(parts)]
        return Federation(data, [train for train, _ in pairs], [test for _, test in pairs])

    def parts(self, data: DataSet, clients: int, seed: int) -> list[Rows]:
        """Return each client's positions in the training split, in rising order."""
        # Imported here: it takes seconds, and only a run that deals data needs it.
        from trellis.data.partition import _flower

        columns: dict[str, Any] = {"index": np.arange(len(data.train))}
        if self.labelled:
            # Ranks rather than labels: one of Flower's partitioners counts on classes 0, 1, ... without a gap.
            columns["label"] = np.unique(data.labels(), return_inverse=True)[1]
        if data.natural_id is not None:
            columns["id"] = np.asarray(data.natural_id)
        # Some of Flower's partitioners cut the rows as they stand, so they are shuffled first for all.
        order = seeding.numpy_generator(seed, "partition", "order").permutation(len(data.train))
        columns = {name: column[order] for name, column in columns.items()}
        deal = Deal(len(data.train), clients, seeding.derive(seed, "partition", "flower") & 0xFFFFFFFF)
        try:
            parts = _flower.deal(self.flower(deal), columns)
        except ValueError as error:
            reason = str(error).rstrip(". ")
            raise DataError(
                "partition-impossible", f"{self.name}: {reason}; change {' or '.join(self.knobs)}"
            ) from None
        dealt = np.concatenate(parts)
        assert len(np.unique(dealt)) == len(dealt), "an example was dealt twice"
        return parts

    def _own_test(self, part: Rows, seed: int, client: int) -> tuple[Rows, Rows]:
        """Split a client's rows into training and test; at least one training example remains."""
        count = min(round(len(part) * self.config.test_fraction), max(len(part) - 1, 0))
        if count == 0:
            return part, part[:0]
        shuffled = seeding.numpy_generator(seed, "partition", "test", client).permutation(part)
        return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def _has_labels(data: DataSet) -> bool:
    y = data.train.fields.get("y")
    return y is not None and y.ndim == 1 and not y.is_floating_point() and data.num_classes > 0


class Empties(Sequence[Rows]):
    """As many empty parts as there are clients, all the same array."""

    _empty: ClassVar[Rows] = np.empty(0, np.int64)

    def __init__(self, clients: int) -> None:
        self._clients = range(clients)

    def __len__(self) -> int:
        return len(self._clients)

    @overload
    def __getitem__(self, index: int) -> Rows: ...
    @overload
    def __getitem__(self, index: slice) -> Empties: ...
    def __getitem__(self, index: int | slice) -> Rows | Empties:
        found = self._clients[index]  # raises IndexError, and counts from the end, as a list does
        return Empties(len(found)) if isinstance(found, range) else self._empty
