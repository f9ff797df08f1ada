"""First and second moments of features by class: read from clients' answers, pooled exactly, sampled from.

An answer's layout is that of the question ``query.moments``. Pooling is the law of total covariance in its centred
form, in float64: with n_k examples of mean m_k and unbiased covariance S_k at client k,

    N = sum n_k        m = sum n_k m_k / N
    S = ( sum (n_k - 1) S_k  +  sum n_k (m_k - m)(m_k - m)^T ) / (N - 1)

which is the mean and unbiased covariance of all clients' features together (Luo et al. 2021, equations 3 and 4, whose
form subtracts large numbers where means are large).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from trellis import records

Floats = NDArray[np.floating[Any]]
Matrix = NDArray[np.float64]

RECORD = "moments"
CHUNK = 16
"""Covariances that are checked at a time."""
MAX_COUNT = 10**9
"""Largest count of examples of one class that is believed."""


class RefusedError(ValueError):
    """An answer cannot be pooled; the text is ``code: what is wrong``."""


@dataclass(frozen=True)
class Layout:
    """What was asked for: ``upload`` is "packed", "full" or "low-rank"; ``rank`` is of the latter only."""

    classes: int
    features: int
    upload: str = "packed"
    rank: int = 0
    dtype: str = "float32"

    def arrays(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        """Return shape and dtype of every array of an answer; None is the number of classes it is about."""
        size, dtype = self.features, self.dtype
        second: dict[str, dict[str, tuple[int, ...]]] = {
            "packed": {"triangles": (size * (size + 1) // 2,)},
            "full": {"covariances": (size, size)},
            "low-rank": {"factors": (min(self.rank, size), size), "residuals": (size,)},
        }
        rows: dict[str, tuple[int, ...]] = {"means": (size,), **second[self.upload]}
        return {
            "labels": ((None,), "int64"),
            "counts": ((None,), "int64"),
            **{name: ((None, *shape), dtype) for name, shape in rows.items()},
        }


@dataclass(frozen=True)
class Answer:
    """One client's moments as they came, checked: row i is about class ``labels[i]``."""

    labels: NDArray[np.int64]
    counts: NDArray[np.int64]
    means: Floats
    second: Mapping[str, Floats]

    def scatter(self, row: int) -> Matrix:
        """Return the covariance of a row times (count - 1), the upper triangle row by row."""
        packed: Floats = self.second["triangles"][row] if "triangles" in self.second else packed_of(self.square(row))
        return np.multiply(packed, float(max(int(self.counts[row]) - 1, 0)), dtype=np.float64)

    def square(self, row: int) -> Matrix:
        """Return the covariance of a row, ``(D, D)``."""
        if "triangles" in self.second:
            return unpacked(self.second["triangles"][row], self.means.shape[1])
        if "covariances" in self.second:
            values: Matrix = self.second["covariances"][row].astype(np.float64)
            return (values + values.T) / 2
        factors: Matrix = self.second["factors"][row].astype(np.float64)
        return np.asarray(factors.T @ factors + np.diag(self.second["residuals"][row].astype(np.float64)))


def read(record: ArrayRecord | None, layout: Layout) -> Answer:
    """Check one client's answer and return it.

    Rows that count zero examples are left out.

    Raises:
        RefusedError: arrays are missing or of other shapes or dtypes, larger than asked for, not finite; labels are
            unknown or stand twice; counts are negative; a covariance is not symmetric or not positive semidefinite,
            both beyond what rounding in its dtype explains.
    """
    arrays = _arrays(record, layout)
    labels, counts, means = arrays.pop("labels"), arrays.pop("counts"), arrays.pop("means")
    if labels.size and (labels.min() < 0 or labels.max() >= layout.classes):
        raise RefusedError(f"label: class {labels[(labels < 0) | (labels >= layout.classes)][0]} of {layout.classes}")
    if len(np.unique(labels)) < len(labels):
        raise RefusedError("label: a class stands twice")
    if counts.size and not 0 <= counts.min() <= counts.max() <= MAX_COUNT:
        raise RefusedError(f"count: counts from {counts.min()} to {counts.max()}; allowed is 0 to {MAX_COUNT}")
    for name, values in {"means": means, **arrays}.items():
        if not np.isfinite(values).all():
            raise RefusedError(f"nonfinite: {name} has values that are not finite")
    kept = counts > 0
    answer = Answer(labels[kept], counts[kept], means[kept], {name: values[kept] for name, values in arrays.items()})
    _check_covariances(answer, layout)
    return answer


def _arrays(record: ArrayRecord | None, layout: Layout) -> dict[str, NDArray[Any]]:
    wanted = layout.arrays()
    if record is None or set(record) != set(wanted):
        found = "no record" if record is None else f"arrays {sorted(record)[:6]}"
        raise RefusedError(f"names: {found}, not {sorted(wanted)}")
    rows = record["labels"].shape[0] if len(record["labels"].shape) == 1 else -1
    if not 0 <= rows <= layout.classes:
        raise RefusedError(f"oversized: labels of shape {tuple(record['labels'].shape)} for {layout.classes} classes")
    values = {}
    for name, (shape, dtype) in wanted.items():
        expected = tuple(rows if length is None else length for length in shape)
        if tuple(record[name].shape) != expected or record[name].dtype != dtype:
            raise RefusedError(
                f"shape: {name} is {record[name].dtype} {tuple(record[name].shape)}, not {dtype} {expected}"
            )
        needed = int(np.prod(expected)) * np.dtype(dtype).itemsize
        if records.num_bytes(record[name]) > needed + 1024:  # the header of a .npy file is below that
            raise RefusedError(
                f"oversized: {name} has {records.num_bytes(record[name])} bytes, {needed} were asked for"
            )
        try:
            values[name] = records.view(record[name])
        except (ValueError, OSError) as error:
            raise RefusedError(f"payload: {name} is not readable: {type(error).__name__}") from None
        if values[name].shape != expected or str(values[name].dtype) != dtype:
            raise RefusedError(f"shape: the payload of {name} is not of the shape and dtype that it says")
    return values


def _check_covariances(answer: Answer, layout: Layout) -> None:
    import torch

    second = answer.second
    if "residuals" in second:
        # F^T F + diag(r) is positive semidefinite by its form where r is not negative.
        if second["residuals"].size and second["residuals"].min() < 0:
            raise RefusedError("psd: residual variances are negative")
        return
    tolerance = 8 * layout.features * float(np.finfo(layout.dtype).eps)
    diagonal = np.arange(layout.features)
    for start in range(0, len(answer.labels), CHUNK):
        labels, part = answer.labels[start : start + CHUNK], slice(start, start + CHUNK)
        if "covariances" in second:
            squares = second["covariances"][part].copy()
            _check_symmetry(squares, labels, tolerance)
        else:
            squares = upper(second["triangles"][part], layout.features)
        largest = squares[:, diagonal, diagonal].max(axis=1, initial=0.0)
        squares[:, diagonal, diagonal] += tolerance * largest[:, None]
        # The factorisation exists where all eigenvalues are above about -tolerance * largest. It reads the lower half
        # of the transposes, which lie in memory as LAPACK wants them.
        _, failed = torch.linalg.cholesky_ex(torch.from_numpy(squares).mT)
        for label, variance, wrong, square in zip(labels, largest, failed.tolist(), squares, strict=True):
            if wrong and (variance > 0 or square.any()):
                raise RefusedError(f"psd: the covariance of class {label} is not positive semidefinite")


def _check_symmetry(squares: Floats, labels: NDArray[np.int64], tolerance: float) -> None:
    for label, square in zip(labels, squares, strict=True):
        if np.abs(square - square.T).max() > tolerance * max(np.abs(square).max(), 1e-30):
            raise RefusedError(f"symmetry: the covariance of class {label} is not symmetric")


class Pool:
    """The moments of all clients' features together, by class.

    Holds one triangle per class and one mean per client and class; answers are let go.
    """

    def __init__(self, features: int) -> None:
        self.features = features
        self._counts: dict[int, list[int]] = {}
        self._means: dict[int, list[Matrix]] = {}
        self._within: dict[int, Matrix] = {}

    def add(self, answer: Answer) -> None:
        """Take one client's moments in."""
        for row, label in enumerate(map(int, answer.labels)):
            self._counts.setdefault(label, []).append(int(answer.counts[row]))
            self._means.setdefault(label, []).append(answer.means[row].astype(np.float64))
            scatter = answer.scatter(row)
            if label in self._within:
                self._within[label] += scatter
            else:
                self._within[label] = scatter

    @property
    def classes(self) -> list[int]:
        """Labels that somebody reported, ascending."""
        return sorted(self._counts)

    def count(self, label: int) -> int:
        return sum(self._counts[label])

    def mean(self, label: int) -> Matrix:
        """Return the mean of a class, ``(D,)``."""
        counts = np.array(self._counts[label], np.float64)
        means = np.stack(self._means[label])
        # Around the first client's mean: equal means give that mean to the last bit.
        return np.asarray(means[0] + counts @ (means - means[0]) / counts.sum(), np.float64)

    def scatter(self, label: int) -> Matrix:
        """Return the sum of (z - mean)(z - mean)^T over a class, ``(D, D)``."""
        counts = np.array(self._counts[label], np.float64)
        centred = np.stack(self._means[label]) - self.mean(label)
        return unpacked(self._within[label], self.features) + (centred * counts[:, None]).T @ centred

    def covariance(self, label: int) -> Matrix:
        """Return the unbiased covariance of a class, ``(D, D)``; zero where it has one example in all."""
        return self.scatter(label) / max(self.count(label) - 1, 1)

    def shared_covariance(self) -> Matrix:
        """Return the covariance within classes, of all classes together; zero where no class has two examples."""
        total = np.zeros((self.features, self.features))
        for label in self.classes:
            total += self.scatter(label)
        return total / max(sum(self.count(label) - 1 for label in self.classes), 1)


def packed_of(square: Matrix) -> Matrix:
    """Return the upper triangle of a symmetric matrix, row by row."""
    packed: Matrix = square[np.triu_indices(len(square))]
    return packed


def unpacked(triangle: Floats, size: int) -> Matrix:
    """Return the symmetric matrix of an upper triangle."""
    square: Matrix = upper(triangle[None], size)[0].astype(np.float64)
    return square + np.triu(square, 1).T


def upper(triangles: Floats, size: int) -> Floats:
    """Return matrices ``(n, size, size)`` with the given upper triangles ``(n, size (size + 1) / 2)``, zero below."""
    squares = np.zeros((len(triangles), size, size), triangles.dtype)
    start = 0
    for row in range(size):  # slices of rows copy ten times as fast as a gather by two indices
        squares[:, row, row:] = triangles[:, start : start + size - row]
        start += size - row
    return squares


def root(covariance: Matrix, ridge: float) -> Matrix:
    """Return L with L L^T = S + ridge * trace(S) / D * I; negative eigenvalues that rounding left count as zero."""
    size = len(covariance)
    lifted = covariance + ridge * np.trace(covariance) / size * np.eye(size)
    try:
        lower: Matrix = np.linalg.cholesky(lifted)
    except np.linalg.LinAlgError:  # fewer examples than features, and no ridge
        values, vectors = np.linalg.eigh(lifted)
        lower = vectors * np.sqrt(np.clip(values, 0, None))
    return lower


def virtual_features(
    pool: Pool,
    amounts: Mapping[int, int],
    generator: np.random.Generator,
    *,
    shrinkage: float = 0.0,
    ridge: float = 1e-6,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Draw features from one Gaussian per class.

    The covariance of a class of N examples is ((N - 1) S + a W) / (N - 1 + a) with W the covariance within all
    classes and a the ``shrinkage``, in examples. a = 0 is the paper's S; a class with one example has no covariance
    of its own and takes W, which is what the formula tends to.

    Args:
        pool: the moments.
        amounts: how many features to draw of each class.
        generator: the only source of randomness.
        shrinkage: a.
        ridge: share of the mean variance that every direction gets on top, so that the matrix has a root.

    Returns:
        Features ``(n, D)`` and labels ``(n,)``, classes in ascending order.
    """
    few = shrinkage > 0 or any(pool.count(label) == 1 for label in amounts)
    shared = pool.shared_covariance() if few else np.zeros((pool.features, pool.features))
    features, labels = [], []
    for label in sorted(amounts):
        own = pool.count(label) - 1
        weight = shrinkage if own else 1.0
        covariance = (pool.scatter(label) + weight * shared) / (own + weight) if weight else pool.covariance(label)
        noise = generator.standard_normal((amounts[label], pool.features))
        features.append((pool.mean(label) + noise @ root(covariance, ridge).T).astype(np.float32))
        labels.append(np.full(amounts[label], label, np.int64))
    return np.concatenate(features), np.concatenate(labels)


def amounts(pool: Pool, per_class: int, classes: Iterable[int], *, proportional: bool) -> dict[int, int]:
    """Return how many virtual features each class gets: the same, or the same sum dealt in proportion to counts."""
    chosen = list(classes)
    if not proportional:
        return dict.fromkeys(chosen, per_class)
    examples = sum(pool.count(label) for label in chosen)
    return {label: max(1, round(per_class * len(chosen) * pool.count(label) / examples)) for label in chosen}
