"""What a strategy carries from round to round, as tensors and plain data, and back into a new strategy.

Flower's strategies keep their state in attributes: momenta, second moments, clipping norms, nested strategies,
tree ensembles. All attributes that hold data are captured: arrays, numbers, text, bytes, None, lists, tuples and
dicts of these, Flower's records, dataclasses, nested strategies. A strategy (or any object in an attribute) that
has ``state_dict()`` and ``load_state_dict()`` is asked instead. Functions and classes are not state. Anything
else is an error unless it is the same as in a strategy just built, so that nothing is lost in silence.

No code is named in what is captured: objects are filled in, never made from it, except plain containers.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from pydantic import BaseModel

from trellis import records
from trellis.errors import PluginError, RunError

Tensors = dict[str, NDArray[Any]]
CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial, type)
ABSENT = object()


def capture(strategy: Strategy, fresh: Strategy | None = None) -> tuple[Tensors, dict[str, Any]]:
    """Return a strategy's state.

    Args:
        strategy: after any number of rounds.
        fresh: the same strategy just built. Attributes that still equal its own are not captured; an object that
            is no data may stay as it was built.

    Returns:
        Tensors by a path such as ``m_t.conv1.weight``, not copied, and the rest as data that JSON can hold exactly.

    Raises:
        PluginError: an attribute holds something that cannot be stored.
    """
    encoder = _Encoder()
    return encoder.tensors, {"strategy": encoder.object(strategy, ABSENT if fresh is None else fresh, "")}


def restore(strategy: Strategy, tensors: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
    """Give a strategy that was just built the state that ``capture`` took.

    Raises:
        RunError: the state is not this strategy's, or is damaged.
    """
    try:
        _Decoder(tensors).object(strategy, values["strategy"])
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        name = type(strategy).__name__
        raise RunError("checkpoint-strategy", f"not a state of {name}: {type(error).__name__}: {error}") from None


class _Encoder:
    """Turns values into tagged data; arrays go to ``tensors`` and leave their path behind."""

    def __init__(self) -> None:
        self.tensors: Tensors = {}

    def object(self, owner: Any, fresh: Any, path: str) -> dict[str, Any]:
        """Encode what an object carries, as far as it differs from ``fresh`` (``ABSENT``: all of it)."""
        if _keeps_own_state(owner):
            return {"own": self.value(owner.state_dict(), path or "state")}
        encoded = {}
        for name, value in vars(owner).items():
            before = getattr(fresh, name, ABSENT)
            if isinstance(value, (*CODE, BaseModel)) or _same(value, before):
                continue
            place = f"{path}.{name}" if path else name
            if _is_filled_in(value):
                encoded[name] = {"object": self.object(value, before, place)}
            else:
                encoded[name] = self.value(value, place)
        return {"attributes": encoded}

    def value(self, value: Any, path: str) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return {"float": value.hex()}  # exact, and not-a-number survives
        if isinstance(value, bytes):
            return {"bytes": self.tensor(np.frombuffer(value, np.uint8), path)}
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            return {"array": self.tensor(value, path)}
        if isinstance(value, np.generic) and value.dtype.kind in "biufc":
            return {"scalar": self.tensor(np.asarray(value), path)}
        if type(value) in (list, tuple):
            return {type(value).__name__: [self.value(v, f"{path}.{i}") for i, v in enumerate(value)]}
        if isinstance(value, ArrayRecord):
            return {"arrays": [[k, self.tensor(records.view(a), f"{path}.{k}")] for k, a in value.items()]}
        if isinstance(value, MetricRecord | ConfigRecord):
            kind = "metrics" if isinstance(value, MetricRecord) else "config"
            return {kind: self.value(dict(value), path)}
        if type(value) is dict and all(type(k) in (str, int) for k in value):
            return {"dict": [[k, self.value(v, f"{path}.{k}")] for k, v in value.items()]}
        raise PluginError(
            "strategy-state",
            f"strategy attribute {path!r} holds {type(value).__module__}.{type(value).__qualname__}, which a "
            "checkpoint cannot store; give the strategy state_dict() and load_state_dict()",
        )

    def tensor(self, values: NDArray[Any], path: str) -> str:
        while path in self.tensors:  # {"a.b": x, "a": {"b": y}}
            path += "'"
        self.tensors[path] = values
        return path


class _Decoder:
    """Undoes ``_Encoder``."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self.tensors = tensors

    def object(self, owner: Any, state: Mapping[str, Any]) -> None:
        if "own" in state:
            owner.load_state_dict(self.value(state["own"]))
            return
        for name, value in state["attributes"].items():
            if name.startswith("__") or callable(getattr(type(owner), name, None)):
                raise ValueError(f"{name!r} is not an attribute that holds state")
            inner = getattr(owner, name, None)
            if not isinstance(value, dict) or "object" not in value:
                setattr(owner, name, self.value(value))
            elif dataclasses.is_dataclass(inner) and not isinstance(inner, type):
                setattr(owner, name, self.filled_in(inner, value["object"]))
            else:
                self.object(inner, value["object"])

    def filled_in(self, inner: Any, state: Mapping[str, Any]) -> Any:
        """Return a dataclass with its captured fields in place of its own; it may be frozen."""
        names = {field.name for field in dataclasses.fields(inner)}
        if not state["attributes"].keys() <= names:
            raise ValueError(f"{type(inner).__name__} has no fields {sorted(state['attributes'].keys() - names)}")
        return dataclasses.replace(inner, **{k: self.value(v) for k, v in state["attributes"].items()})

    def value(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "float":
            return float.fromhex(content)
        if kind == "bytes":
            return self.tensors[content].tobytes()
        if kind == "array":
            return self.tensors[content].copy()
        if kind == "scalar":
            return self.tensors[content][()]
        if kind in ("list", "tuple"):
            items = [self.value(v) for v in content]
            return items if kind == "list" else tuple(items)
        if kind == "arrays":
            return records.array_record({name: self.tensors[key].copy() for name, key in content})
        if kind == "metrics":
            return MetricRecord(self.value(content))
        if kind == "config":
            return ConfigRecord(self.value(content))
        if kind == "dict":
            return {k: self.value(v) for k, v in content}
        raise ValueError(f"no kind of value is called {kind!r}")


def _keeps_own_state(value: Any) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))


def _is_filled_in(value: Any) -> bool:
    is_dataclass = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return isinstance(value, Strategy) or is_dataclass or _keeps_own_state(value)


def _same(value: Any, other: Any) -> bool:
    """Whether two values are of one type and equal in all their parts."""
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, np.ndarray):
        return value.dtype == other.dtype and np.array_equal(value, other)
    if isinstance(value, ArrayRecord):
        return list(value) == list(other) and records.digest(value) == records.digest(other)
    if isinstance(value, list | tuple):
        return len(value) == len(other) and all(map(_same, value, other))
    if isinstance(value, dict):
        return list(value) == list(other) and all(_same(v, other[k]) for k, v in value.items())
    if isinstance(value, CODE):
        return True
    if any("__eq__" in vars(kind) for kind in type(value).__mro__[:-1]):
        equal = value == other
        return isinstance(equal, bool | np.bool_) and bool(equal)
    return hasattr(value, "__dict__") and _same(vars(value), vars(other))
