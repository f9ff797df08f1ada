"""Prototypes of classes - how many examples, and their mean embedding - merged exactly and in any order.

Clients send what is new since their last report (``Evidence``): labels, counts and means. The pooled mean of a
class is the sum of ``count * mean`` over all reports, divided by the sum of the counts. Added up as floats, that
sum would depend in its last bits on the order in which reports come in. Here it is kept as integers, in units of
2**-52: adding integers is associative and commutative, so any order and any grouping of reports give the same bits,
and nothing but the sums need be kept. The running mean of the paper,
``p += b / (n + b) * (m - p)`` (Hendryx et al., 2021, section 4), is the same number up to its rounding.

A report of float32 means and counts below 2**29 is taken in without any rounding above 2**-53 in absolute terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trellis.errors import RunError

BITS = 52
UNIT = 2.0**-BITS
CARRY_AFTER = 2048
"""Reports after which fractions, each below half a unit of the whole, are carried over; 2**11 of them fit easily."""
ROWS = 64
"""Rows merged at a time, so that intermediate values stay in a core's cache."""

MAX_COUNT = 1 << 29
MAX_VALUE = 1e6
"""Largest embedding coordinate taken: with counts below ``MAX_COUNT`` no sum of a report leaves float64's integers."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Evidence:
    """What one client has newly seen.

    Attributes:
        labels: int64 ``(m,)``, each once.
        counts: int64 ``(m,)``, examples of each, from 1 up.
        means: float ``(m, width)``, their mean embeddings; width 0 where only counts are wanted.
        version: number of the report among the client's; the same number stands for the same examples.
    """

    labels: Ints
    counts: Ints
    means: NDArray[np.floating[Any]]
    version: int

    def problem(self, num_classes: int, width: int, max_count: int = MAX_COUNT) -> str | None:
        """Return what is wrong with a report as ``"code: reason"``, or None. Never raises over its values."""
        labels, counts, means = self.labels, self.counts, self.means
        if not (labels.ndim == counts.ndim == 1 and means.ndim == 2 and len(labels) == len(counts) == len(means)):
            return f"evidence: {labels.shape} labels, {counts.shape} counts and {means.shape} means do not go together"
        if means.shape[1] != width:
            return f"evidence: means of width {means.shape[1]}, not {width}"
        if self.version < 0:
            return f"evidence: version {self.version} is negative"
        unknown = labels[(labels < 0) | (labels >= num_classes)]
        if len(unknown):
            return f"evidence: label {unknown[0]} is none of the {num_classes} classes"
        if len(np.unique(labels)) != len(labels):
            return "evidence: a label stands twice"
        most = min(max_count, MAX_COUNT)
        wrong = (counts < 1) | (counts > most)
        if wrong.any():
            at = int(np.argmax(wrong))
            return f"evidence: the count of label {labels[at]} is {counts[at]}; allowed is 1 to {most}"
        # One comparison finds NaN and infinity too, as both are not below the limit.
        far = ~(np.abs(means) <= MAX_VALUE)
        if far.any():
            at = int(np.argmax(far.any(axis=1)))
            return f"evidence: the mean of label {labels[at]} has values that are not finite or beyond {MAX_VALUE:g}"
        return None


class PrototypeStore:
    """Prototypes of all classes, with a ledger of the reports that went into them.

    Args:
        num_classes: labels run from 0 to one below.
        width: numbers of an embedding; 0 keeps counts only.

    Attributes:
        counts: int64 ``(num_classes,)``, examples behind each prototype.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        self.counts = np.zeros(num_classes, np.int64)
        self._whole = np.zeros((num_classes, width), np.int64)
        self._rest = np.zeros((num_classes, width), np.int64)
        self._uncarried = 0
        self._ledger: dict[tuple[int, int], Ints] = {}

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @property
    def width(self) -> int:
        return self._whole.shape[1]

    @property
    def learnt(self) -> Ints:
        """Labels with at least one example, rising."""
        return np.flatnonzero(self.counts)

    def add(self, client: int, evidence: Evidence) -> Ints:
        """Merge a report and return the labels that were new to the ledger, rising.

        What a client has reported before under the same version is passed over, so a report may come twice, or
        in pieces that overlap.

        Raises:
            ValueError: the report is malformed (see ``Evidence.problem``); nothing of it was taken.
        """
        if problem := evidence.problem(self.num_classes, self.width):
            raise ValueError(problem)
        key = (client, evidence.version)
        known = self._ledger.get(key)
        order = np.argsort(evidence.labels, kind="stable")
        if known is not None:
            order = order[~np.isin(evidence.labels[order], known)]
        labels = evidence.labels[order]
        if not len(labels):
            return labels
        self._ledger[key] = labels if known is None else np.union1d(known, labels)
        counts = evidence.counts[order]
        self.counts[labels] += counts
        if self.width:
            for start in range(0, len(labels), ROWS):
                rows = slice(start, start + ROWS)
                self._add_rows(labels[rows], counts[rows], evidence.means[order[rows]])
            self._uncarried += 1
            if self._uncarried >= CARRY_AFTER:
                self._carry()
        return labels

    def _add_rows(self, labels: Ints, counts: Ints, means: NDArray[np.floating[Any]]) -> None:
        sums = means.astype(np.float64)
        sums *= counts[:, None]
        whole = np.rint(sums)
        sums -= whole  # exact: both are multiples of the sum's last bit, and what is left is at most a half
        sums *= 1 / UNIT
        np.rint(sums, out=sums)
        first, last = int(labels[0]), int(labels[-1])
        # Labels rise, so where none is missing they are a slice, which needs no gathering.
        place = slice(first, last + 1) if last - first + 1 == len(labels) else labels
        self._whole[place] += whole.astype(np.int64)
        self._rest[place] += sums.astype(np.int64)

    def _carry(self) -> None:
        """Bring fractions into [0, 1): from here on the integers depend on the sums alone."""
        self._whole += self._rest >> BITS
        self._rest &= (1 << BITS) - 1
        self._uncarried = 0

    def means(self) -> NDArray[np.float64]:
        """Return the prototypes, ``(num_classes, width)``; zeros for classes without an example."""
        self._carry()
        sums = self._whole + self._rest * UNIT
        result: NDArray[np.float64] = sums / np.maximum(self.counts, 1)[:, None]
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return all there is to keep. Stores that took in the same reports, in whatever order, return the same."""
        self._carry()
        keys = sorted(self._ledger)
        reports = [self._ledger[key] for key in keys]
        return {
            "counts": self.counts.copy(),
            "whole": self._whole.copy(),
            "rest": self._rest.copy(),
            "reports": np.array(
                [(*key, len(labels)) for key, labels in zip(keys, reports, strict=True)], np.int64
            ).reshape(-1, 3),
            "labels": np.concatenate([np.empty(0, np.int64), *reports]),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> PrototypeStore:
        """Return the store that ``state_dict`` described.

        Raises:
            RunError: the parts do not go together.
        """
        counts, whole, rest, reports, labels = (state[key] for key in ("counts", "whole", "rest", "reports", "labels"))
        if whole.shape != rest.shape or len(whole) != len(counts) or int(reports[:, 2].sum()) != len(labels):
            raise RunError("checkpoint-prototypes", "the parts of a prototype store do not go together")
        store = cls(*whole.shape)
        store.counts, store._whole, store._rest = counts.copy(), whole.copy(), rest.copy()
        parts = np.split(labels, np.cumsum(reports[:, 2])[:-1]) if len(reports) else []
        for (client, version, _), part in zip(reports.tolist(), parts, strict=True):
            store._ledger[client, version] = part
        return store
