"""The checks that one reply must pass by itself, each a function in a table under its code.

A check returns what is wrong in one line, or None. Which checks a message's category asks for, and in which
order, stands in ``BY_CATEGORY``. What can only be seen beside the other replies is in ``_cohort``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flwr.app import Array, Message, RecordDict
from numpy.typing import NDArray

from trellis import memory
from trellis.grids._npy import PayloadError, declared, opened
from trellis.grids._updates import Key, Layout, Measurement, Values, measure
from trellis.records import array_records, arrays_of, metric_records
from trellis.scenario import Screening

WEIGHT = "num-examples"

Shape = tuple[int | None, ...]
Expected = Mapping[str, Mapping[str, tuple[Shape, str]]]
"""Record name -> array name -> shape (None: any length) and dtype."""


@dataclass(eq=False)
class Reply:
    """A reply under examination, beside the message it answers.

    Attributes:
        message: the reply.
        to: the message that was sent.
        expected: the arrays that must come back; None where the category leaves them open.
        sent: the values that were sent.
        layout: they as one array, where the model is small.
        counted: whether it is part of the cohort's direction by now.
        cosine: with that direction, leaving itself out; None where there is no such thing.
        comparable: whether there are enough others and dimensions for the cosine to mean something.
    """

    message: Message
    to: Message
    settings: Screening
    expected: Expected | None
    sent: Values
    layout: Layout | None = None
    counted: bool = False
    cosine: float | None = None
    comparable: bool = False

    @cached_property
    def arrays(self) -> list[tuple[str, str, Array]]:
        """Record name, array name and array, of every array."""
        return list(arrays_of(self.message.content))

    @cached_property
    def as_expected(self) -> bool:
        """Whether names, shapes and dtypes are the expected ones to the letter, seen in one comparison."""
        return self.expected is not None and self.expected == {
            name: {key: (array.shape, array.dtype) for key, array in record.items()}
            for name, record in array_records(self.message.content).items()
        }

    @cached_property
    def values(self) -> Values:
        """The arrays' values: a view where they are in memory, read at each look where they wait on disk.

        Raises PayloadError, naming the array.
        """
        found: dict[Key, NDArray[Any]] = {}
        waiting: dict[Key, Callable[[], NDArray[Any]]] = {}
        for record, name, array in self.arrays:
            try:
                if isinstance(array, memory.SpilledArray):
                    declared(array)
                    waiting[record, name] = array.view
                else:
                    found[record, name] = opened(array)
            except PayloadError as error:
                raise PayloadError(f"{short(f'{record}/{name}')} {error}") from None
        return memory.Lazily(found, waiting) if waiting else found

    @cached_property
    def measured(self) -> Measurement:
        found = self.layout.measure(self.values) if self.layout else None
        return measure(self.values, self.sent) if found is None else found

    def wait(self, folder: Path | None) -> None:
        """Let go of the values until they are needed again, if they are large: they wait on disk."""
        if memory.spill(self.message, folder):
            self.__dict__.pop("arrays", None)
            self.__dict__.pop("values", None)

    @cached_property
    def metrics(self) -> tuple[str, Mapping[str, Any]]:
        """Name and values of the reply's first MetricRecord, which once checked is the only one."""
        return next(iter(metric_records(self.message.content).items()))


def expected_of(message: Message) -> Expected:
    """Return what a reply must hold if it must hold the very arrays that were sent."""
    return {
        record: {name: (tuple(array.shape), array.dtype) for name, array in arrays.items()}
        for record, arrays in array_records(message.content).items()
    }


def values_of(content: RecordDict) -> dict[Key, NDArray[Any]]:
    """Return the values of what we sent ourselves; what is not NumPy cannot be compared and is left out."""
    values = {}
    for record, name, array in arrays_of(content):
        with suppress(PayloadError):
            values[record, name] = opened(array)
    return values


def short(name: str) -> str:
    """Return a name for a message of one line, however long or odd it is."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= 80 else text[:77] + "..."


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(map(short, ordered[:3])) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def _names(reply: Reply) -> str | None:
    if reply.expected is None or reply.as_expected:
        return None
    found: dict[str, set[str]] = {record: set() for record in array_records(reply.message.content)}
    for record, name, _ in reply.arrays:
        found[record].add(name)
    for kind, ours, theirs in (("missing", reply.expected, found), ("not asked for", found, reply.expected)):
        if records := set(ours) - set(theirs):
            return f"{kind}: records of arrays {_some(records)}"
        for record, names in ours.items():
            if arrays := set(names) - set(theirs[record]):
                return f"{kind}: {_some(f'{record}/{name}' for name in arrays)}"
    return None


def _wanted(reply: Reply) -> Iterable[tuple[Key, Array, Shape, str]]:
    if reply.as_expected:
        return
    for record, name, array in reply.arrays:
        wanted = (reply.expected or {}).get(record, {}).get(name)
        if wanted is not None:
            yield (record, name), array, *wanted


def _shape(reply: Reply) -> str | None:
    for key, array, shape, _ in _wanted(reply):
        lengths = tuple(array.shape)
        if lengths == shape:
            continue
        fits = len(lengths) == len(shape) and all(w is None or w == n for w, n in zip(shape, lengths, strict=True))
        if not fits:
            wanted = ", ".join("any" if length is None else str(length) for length in shape)
            return f"{short('/'.join(key))} has shape {str(list(lengths))[:60]}, not [{wanted}]"
    return None


def _dtype(reply: Reply) -> str | None:
    for key, array, _, dtype in _wanted(reply):
        if array.dtype != dtype:
            return f"{short('/'.join(key))} has dtype {str(array.dtype)[:40]}, not {dtype}"
    return None


def _payload(reply: Reply) -> str | None:
    try:
        _ = reply.values
    except PayloadError as error:
        return str(error)
    return None


def _nonfinite(reply: Reply) -> str | None:
    return None if reply.expected is None else reply.measured.nonfinite


def _metrics(reply: Reply) -> str | None:
    count = len(metric_records(reply.message.content))
    return None if count == 1 else f"{count} MetricRecords; there must be exactly one"


def _weight(reply: Reply) -> str | None:
    metrics: Mapping[str, object] = reply.metrics[1]
    if WEIGHT not in metrics:
        return f"{WEIGHT} is missing"
    value, most = metrics[WEIGHT], reply.settings.max_examples
    if not isinstance(value, int | float) or isinstance(value, bool):
        return f"{WEIGHT} is a {type(value).__name__}, not a number"
    return None if 1 <= value <= most else f"{WEIGHT} is {_number(value)}; allowed is 1 to {most}"


def _metric_values(reply: Reply) -> str | None:
    for name, value in reply.metrics[1].items():
        for each in value if isinstance(value, list) else (value,):
            # False for NaN and infinity, and for integers that a weighted average could not turn into floats.
            if not abs(each) <= sys.float_info.max:
                return f"metric {short(name)} is {_number(each)}"
    return None


def _number(value: int | float) -> str:
    return "an integer beyond 64 bits" if abs(value) >= 2**63 and isinstance(value, int) else f"{value:.6g}"


def _unchanged(reply: Reply) -> str | None:
    same = reply.measured.unchanged and not reply.settings.allow_unchanged
    return "every array equals the model that was sent" if same else None


Check = Callable[[Reply], str | None]

CHECKS: dict[str, Check] = {
    "names": _names,
    "shape": _shape,
    "dtype": _dtype,
    "payload": _payload,
    "nonfinite": _nonfinite,
    "subnormal": lambda reply: reply.measured.subnormal,
    "metrics": _metrics,
    "weight": _weight,
    "metric-nonfinite": _metric_values,
    "unchanged": _unchanged,
    "constant": lambda reply: reply.measured.constant,
}

BY_CATEGORY: dict[str, tuple[str, ...]] = {
    "train": tuple(CHECKS),
    "evaluate": ("payload", "metrics", "weight", "metric-nonfinite"),
    "query": ("names", "shape", "dtype", "payload", "nonfinite"),
}


def category(message: Message) -> str:
    """Return ``train``, ``evaluate`` or ``query``; whatever else Flower may send is treated as a query."""
    head = message.metadata.message_type.partition(".")[0]
    return head if head in BY_CATEGORY else "query"


def offence(reply: Reply) -> str | None:
    """Return ``"code: what is wrong"`` for the first check that a reply fails."""
    for code in BY_CATEGORY[category(reply.to)]:
        check = CHECKS.get(code)
        if check is not None and (detail := check(reply)):
            return f"{code}: {detail}"
    return None
