"""What every data set turns into: named tensors with one row per example, kept in memory.

There is no loader object between the data and a training step: a batch is one gather by row number,
which for the small data of federated clients is many times cheaper than a ``DataLoader``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("image", "vector", "tokens", "series", "graph", "points", "events", "pairs", "transitions", "none")
"""Kinds of data a trainer can say it takes."""


@dataclass(frozen=True)
class Batch:
    """Some examples. ``fields`` holds every tensor, first dimension the batch; ``x`` and ``y`` are shorthands.

    ``index`` gives each example's position in its client's split, so a trainer can keep a memory per sample.
    """

    fields: Mapping[str, Tensor]
    index: Tensor

    @property
    def x(self) -> Tensor:
        return self.fields["x"]

    @property
    def y(self) -> Tensor:
        return self.fields["y"]

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Split:
    """Examples of one client (or the held-out set): shared tensors and the rows that belong to it.

    Attributes:
        fields: tensors by name, first dimension all examples of the data set.
        rows: int64 row numbers of this split, shape ``(n,)``.
    """

    fields: Mapping[str, Tensor]
    rows: Tensor

    @classmethod
    def whole(cls, **fields: Tensor) -> Split:
        """Make a split of all rows of the given tensors, which must have equal first dimensions."""
        sizes = {name: len(tensor) for name, tensor in fields.items()}
        assert len(set(sizes.values())) <= 1, sizes
        return cls(fields, torch.arange(next(iter(sizes.values()), 0)))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor) -> Batch:
        """Gather the examples at positions ``index`` (int64, within this split) by one copy per field."""
        return self.gather(self.rows[index], index)

    def gather(self, rows: Tensor, index: Tensor) -> Batch:
        """Gather the examples at positions ``index`` whose rows, ``self.rows[index]``, are at hand already."""
        return Batch({name: tensor.index_select(0, rows) for name, tensor in self.fields.items()}, index)

    def subset(self, index: Tensor) -> Split:
        """Return the part of this split at the given positions, sharing the tensors."""
        return replace(self, rows=self.rows[index])

    def to(self, device: torch.device | str) -> Split:
        """Return the split with its tensors on a device. Rows move along."""
        return Split({k: v.to(device) for k, v in self.fields.items()}, self.rows.to(device))


@dataclass(frozen=True)
class DataSet:
    """A data set in memory.

    Attributes:
        kind: one of ``KINDS``.
        train: the examples that are partitioned over clients.
        test: the held-out examples of the central evaluation; may be empty.
        classes: names of the classes in label order; empty where there are none.
        natural_id: for each training example the id of the user, writer or site it came from, or None.
        facts: anything a trainer of this kind needs to build its model (vocabulary size, node count).
        splits: further streams by name, e.g. ``{"unlabeled": Split}``.
    """

    kind: str
    train: Split
    test: Split
    classes: tuple[str, ...] = ()
    natural_id: Sequence[str] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    splits: Mapping[str, Split] = field(default_factory=dict)

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example's ``x``, without the batch dimension."""
        return tuple(self.train.fields["x"].shape[1:]) if "x" in self.train.fields else ()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def labels(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the labels of the training examples in row order, for partitioners and pictures."""
        labels: np.ndarray[Any, np.dtype[np.int64]] = self.train.fields["y"][self.train.rows].cpu().numpy()
        return labels

    def to(self, device: torch.device | str) -> DataSet:
        return replace(
            self,
            train=self.train.to(device),
            test=self.test.to(device),
            splits={k: v.to(device) for k, v in self.splits.items()},
        )


@dataclass(frozen=True)
class ClientData:
    """What one client holds: its own training and test examples, and further streams by name."""

    client: int
    train: Split
    test: Split
    splits: Mapping[str, Split] = field(default_factory=dict)


@dataclass(frozen=True)
class Federation:
    """A data set dealt out to clients.

    Attributes:
        data: the whole data set.
        parts: for each client, positions in ``data.train`` of its training examples (int64 arrays).
        test_parts: the same for its own test examples; disjoint from ``parts``.
    """

    data: DataSet
    parts: Sequence[np.ndarray[Any, np.dtype[np.int64]]]
    test_parts: Sequence[np.ndarray[Any, np.dtype[np.int64]]]

    @property
    def num_clients(self) -> int:
        return len(self.parts)

    def client(self, number: int) -> ClientData:
        """Return a view of one client's data. Costs two small gathers of row numbers, no copy of examples."""
        train = self.data.train
        device = train.rows.device

        def view(part: np.ndarray[Any, np.dtype[np.int64]]) -> Split:
            return train.subset(torch.from_numpy(part).to(device))

        return ClientData(number, view(self.parts[number]), view(self.test_parts[number]), self.data.splits)

    def label_counts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return examples per client and class, shape ``(clients, classes)``, test splits included."""
        labels, classes = self.data.labels(), max(self.data.num_classes, 1)
        rows = [
            np.bincount(labels[np.concatenate([a, b])], minlength=classes)
            for a, b in zip(self.parts, self.test_parts, strict=True)
        ]
        return np.stack(rows)
