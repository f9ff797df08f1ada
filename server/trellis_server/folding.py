"""Average replies as they come, so that a round holds one model and not one per client.

Flower's averaging strategies take a list of all replies. Where all that such a strategy does with them is a
weighted average, the average is made here, and the strategy is given one reply: the average, with the sum of
the example counts. Its own average over that one reply multiplies by 1.0 and changes no bit.

The average is a running mean (West 1979): after reply i with weight n_i, and N the weights so far,

    mean += (x_i - mean) * (n_i / N)

rather than a sum of n_i * x_i divided at the end. No intermediate value is larger than the data, whatever the
example counts, so nothing overflows; models of one cohort are close to each other, where the difference is
nearly exact; and the mean of one reply, or of equal ones, is that reply bit for bit. Floats are averaged in
their own dtype, half precision in float32 and cast back at the end, integers and booleans in float64, which
is also what they stay (as in Flower's average).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from numpy.typing import NDArray

from trellis import flower, memory, records
from trellis.errors import RoundError
from trellis.memory import Spill, Spilled

FOLDED = "trellis.folded"
"""ConfigRecord of an average: ``replies``, how many went into it, and ``weighted_by``, empty for equal weights."""

AVERAGING = frozenset({FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam, FedYogi})
"""Strategies that use replies for nothing but their average. Exact types: a subclass may look at each reply."""

PLAIN = frozenset({FedAvg, FedProx})
"""Of these, the ones whose new model is the average itself."""

BLOCK = 1 << 16
"""Values that are averaged at a time, so that the difference stays in a core's cache."""

Metric = int | float | list[int] | list[float]


@runtime_checkable
class Folding(Protocol):
    """A strategy that folds replies in its own way."""

    def fold(self, replies: Iterable[Message]) -> list[Message]: ...


def merger(strategy: Strategy) -> Strategy:
    """Return the strategy that merges replies: one that leaves all rounds to another names it as ``inner``."""
    while isinstance(inner := getattr(strategy, "inner", None), Strategy):
        strategy = inner
    return strategy


def folds(strategy: Strategy) -> bool:
    """Whether the strategy does the same with one average as with all replies."""
    strategy = merger(strategy)
    if isinstance(strategy, Folding):
        return True
    return (
        type(strategy) in AVERAGING
        and isinstance(strategy, FedAvg)
        and strategy.train_metrics_aggr_fn is aggregate_metricrecords
    )


def folded(strategy: Strategy, replies: Iterable[Message], folder: Path | None = None) -> list[Message]:
    """Fold replies as the strategy needs it. Only for strategies that fold. ``folder`` as for ``fold``."""
    strategy = merger(strategy)
    if isinstance(strategy, Folding):
        return strategy.fold(replies)
    assert isinstance(strategy, FedAvg), type(strategy)
    assert folds(strategy), type(strategy)
    return fold(replies, strategy.weighted_by_key, folder=folder)


def aggregate(
    strategy: Strategy, server_round: int, averages: list[Message]
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Return what ``strategy.aggregate_train`` makes of folded replies.

    Where that is the average itself it is taken as it is, instead of copied, multiplied by 1.0, written as
    ``.npy`` bytes and read again.
    """
    strategy = merger(strategy)
    average = averages[0] if averages else None
    if type(strategy) not in PLAIN or not folds(strategy) or average is None or average.has_error():
        return strategy.aggregate_train(server_round, averages)
    (arrays,) = records.array_records(average.content).values()
    (metrics,) = (record for record in average.content.values() if isinstance(record, MetricRecord))
    assert isinstance(strategy, FedAvg)
    return arrays, MetricRecord({name: v for name, v in metrics.items() if name != strategy.weighted_by_key})


def fold(
    replies: Iterable[Message], weighted_by: str, *, uniform: bool = False, folder: Path | None = None
) -> list[Message]:
    """Average the content of replies one by one; each is let go before the next is taken.

    The result depends on the order of the replies in its last bits, and on nothing else.

    Args:
        replies: with content or errors.
        weighted_by: the metric that holds a reply's example count.
        uniform: arrays count equally; metrics are weighted nonetheless.
        folder: where the mean of a large model is kept meanwhile; None for the system's temporary folder.

    Returns:
        One message with the averages, if any reply had content, then all error messages.

    Raises:
        RoundError: a reply's names or shapes differ from the first one's, its example count is not a number
            from zero up, or all counts are zero.
    """
    average, errors = Average(weighted_by, uniform, folder), []
    for reply in replies:
        if reply.has_error():
            errors.append(reply)
        else:
            average.add(reply)
        # The loop variable would keep the reply alive while the next one is made.
        del reply
    return [average.message(), *errors] if average.count else errors


class Average:
    """The weighted mean of the replies so far. That of a large model is kept on disk until it is asked for."""

    def __init__(self, weighted_by: str, uniform: bool = False, folder: Path | None = None) -> None:
        self.folder = folder
        self.weighted_by = weighted_by
        self.uniform = uniform
        self.count = 0
        self.examples: int | float = 0
        self.weight: int | float = 0
        self.arrays: dict[str, dict[str, NDArray[Any] | Spilled]] = {}
        self.dtypes: dict[str, dict[str, np.dtype[Any]]] = {}
        self.metrics: dict[str, Metric] = {}
        self.scratch: dict[np.dtype[Any], NDArray[Any]] = {}

    def add(self, reply: Message) -> None:
        """Take a reply into the mean."""
        content = reply.content
        metrics = self._metrics_of(reply)
        examples = metrics.pop(self.weighted_by, None)
        if not isinstance(examples, int | float) or not math.isfinite(examples) or examples < 0:
            raise _mismatch(reply, f"metric {self.weighted_by!r} is {examples!r}, not a count of examples")
        folded = content.get(FOLDED, ConfigRecord())
        assert isinstance(folded, ConfigRecord)
        count = folded.get("replies", 1)
        assert isinstance(count, int)
        assert folded.get("weighted_by", self._key) == self._key, "an average under other weights"
        if not self.count:
            self._start(reply, metrics)
        self._check_names(reply, metrics)
        self.count += count
        self.examples += examples
        if weight := count if self.uniform else examples:
            self.weight += weight
            for name, record in records.array_records(content).items():
                for key, array in record.items():
                    self._include(self.arrays[name][key], array, weight / self.weight)
        if examples:
            share = examples / self.examples
            self.metrics = {name: _mean(self.metrics[name], metrics[name], share) for name in self.metrics}

    def message(self) -> Message:
        """Return the mean as a reply in the name of the first client, with the sum of all example counts."""
        if not self.weight or not self.examples:
            raise RoundError("round-no-examples", f"all {self.count} replies count zero examples ({self.weighted_by})")
        content = RecordDict()
        for name, means in self.arrays.items():
            kept = self.dtypes[name]
            content[name] = records.array_record({key: _whole(mean, kept[key]) for key, mean in means.items()})
        content[self.metric_record] = MetricRecord({self.weighted_by: self.examples, **self.metrics})
        content[FOLDED] = ConfigRecord({"replies": self.count, "weighted_by": self._key})
        # Flower offers this overload to itself only; see trellis.flower.
        return Message(content=content, metadata=self.metadata)  # type: ignore[call-overload, no-any-return]

    @property
    def _key(self) -> str:
        return "" if self.uniform else self.weighted_by

    def _metrics_of(self, reply: Message) -> dict[str, Metric]:
        found = [(name, record) for name, record in reply.content.items() if isinstance(record, MetricRecord)]
        if len(found) != 1:
            raise _mismatch(reply, f"it has {len(found)} MetricRecords, not one")
        self.metric_record, record = found[0]
        return dict(record)

    def _start(self, reply: Message, metrics: dict[str, Metric]) -> None:
        self.metadata = reply.metadata
        self.metrics = dict(metrics)
        for name, record in records.array_records(reply.content).items():
            self.dtypes[name] = {key: records.dtype_of(array) for key, array in record.items()}
            spill = Spill(self.folder) if sum(map(records.num_bytes, record.values())) >= memory.LARGE else None
            zeros = np.zeros if spill is None else spill.zeros
            self.arrays[name] = {
                key: zeros(tuple(array.shape), _wide(self.dtypes[name][key])) for key, array in record.items()
            }

    def _check_names(self, reply: Message, metrics: dict[str, Metric]) -> None:
        if metrics.keys() != self.metrics.keys():
            raise _mismatch(reply, f"its metrics are {sorted(metrics)}, the first reply's {sorted(self.metrics)}")
        own = records.array_records(reply.content)
        if own.keys() != self.arrays.keys():
            raise _mismatch(reply, f"its ArrayRecords are {sorted(own)}, the first reply's {sorted(self.arrays)}")
        for name, record in own.items():
            if differing := record.keys() ^ self.arrays[name].keys():
                raise _mismatch(reply, f"{name} differ from the first reply's in {sorted(differing)[0]!r}")
            for key, array in record.items():
                shape = self.arrays[name][key].shape
                if tuple(array.shape) != shape:
                    raise _mismatch(reply, f"{name} {key!r} has shape {tuple(array.shape)}, not {shape}")

    def _include(self, mean: NDArray[Any] | Spilled, array: Array, share: float) -> None:
        if not isinstance(mean, Spilled):
            self._move(mean, records.view(array), share)
        elif isinstance(array, memory.SpilledArray):
            for (_, piece), (_, values) in zip(mean.pieces(write=True), array.spilled.pieces(), strict=True):
                self._move(piece, values, share)
        else:
            flat = records.view(array).reshape(-1)
            for start, piece in mean.pieces(write=True):
                self._move(piece, flat[start : start + piece.size], share)

    def _move(self, mean: NDArray[Any], values: NDArray[Any], share: float) -> None:
        """Move a mean towards values, in place."""
        if share == 1.0:  # the first that counts
            np.copyto(mean, values)
            return
        if mean.size <= BLOCK:
            step = values - mean
            step *= share
            mean += step
            return
        if mean.dtype not in self.scratch:
            self.scratch[mean.dtype] = np.empty(BLOCK, mean.dtype)
        scratch = self.scratch[mean.dtype]
        flat_mean, flat = mean.reshape(-1), values.reshape(-1)
        for start in range(0, flat.size, BLOCK):
            part = flat_mean[start : start + BLOCK]
            step = scratch[: part.size]
            np.subtract(flat[start : start + BLOCK], part, out=step)
            step *= share
            part += step


def _mean(mean: Metric, value: Metric, share: float) -> Metric:
    if share == 1.0:
        return value
    if isinstance(mean, list) and isinstance(value, list):
        return [m + (v - m) * share for m, v in zip(mean, value, strict=True)]
    assert not isinstance(mean, list)
    assert not isinstance(value, list)
    return mean + (value - mean) * share


def _whole(mean: NDArray[Any] | Spilled, kept: np.dtype[Any]) -> NDArray[Any]:
    """Return a mean in memory, half precision in the dtype that came."""
    values = mean.read() if isinstance(mean, Spilled) else mean
    return values.astype(kept, copy=False) if _half(kept) else values


@cache
def _half(dtype: np.dtype[Any]) -> bool:
    return dtype.name in ("float16", "bfloat16")


@cache
def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that values are averaged in."""
    if _half(dtype):
        return np.dtype(np.float32)
    return np.dtype(np.float64) if dtype.kind in "iub" else dtype


def _mismatch(reply: Message, problem: str) -> RoundError:
    client = flower.client_of(reply.metadata.src_node_id)
    return RoundError("round-mismatch", f"the reply of client {client} does not go with the others: {problem}")
