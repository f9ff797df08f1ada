"""Flower's partitioners at work on row numbers.

They take a Hugging Face data set and cut it with ``select``, ``shard`` and ``sort``. Each such cut makes and
fingerprints a table of its own, about half a millisecond; with 10,000 clients that is seconds. Only row numbers
are wanted here, so the data set below answers ``select`` with them and makes no table. ``shard`` and every
partitioner go through these public methods; a test deals with the plain data set too and compares.

Importing this module takes seconds. It opens no connection.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray


class RowNumbers(Dataset):  # type: ignore[misc]  # an untyped base
    """A data set whose ``select`` returns the values of its column ``index`` at the given positions."""

    @classmethod
    def of(cls, columns: Mapping[str, NDArray[Any]]) -> Self:
        """Make one of columns of equal length, ``index`` among them."""
        made: Self = cls.from_dict(dict(columns))
        made.columns = dict(columns)
        return made

    columns: dict[str, NDArray[Any]]

    def select(self, indices: Iterable[int], *_: object, **__: object) -> NDArray[np.int64]:
        positions = np.fromiter(indices, dtype=np.int64)
        return self.columns["index"][positions]

    def sort(self, column_names: str, *_: object, **__: object) -> Self:
        order = np.argsort(self.columns[column_names], kind="stable")
        return type(self).of({name: column[order] for name, column in self.columns.items()})


def deal(partitioner: Any, columns: Mapping[str, NDArray[Any]]) -> list[NDArray[np.int64]]:
    """Return every partition's values of the column ``index``, sorted.

    Args:
        partitioner: one of ``flwr_datasets.partitioner`` without a data set.
        columns: arrays of equal length: ``index``, and whatever the partitioner goes by.

    Raises:
        ValueError: what the partitioner says when the data cannot be dealt as asked.
    """
    partitioner.dataset = RowNumbers.of(columns)
    # What they warn of is either repaired (Dirichlet draws again) or an error of ours; and one shows a bar.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return [np.sort(partitioner.load_partition(number)) for number in range(partitioner.num_partitions)]
