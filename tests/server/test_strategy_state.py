"""A strategy that is captured, written, read and restored goes on to the same bits."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg, Strategy
from safetensors.numpy import load, save

import tiny_federation as tiny
from trellis import records
from trellis.errors import PluginError, RunError
from trellis_server import strategy_state


def through_bytes(tensors: dict[str, Any], values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    text = json.dumps(values, allow_nan=False)
    plain = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in tensors.items()}
    return load(save(plain)), json.loads(text)


# Wrappers too, around a strategy that has a state of its own.
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in tiny.STRATEGIES),
    ("fedavgm", {"server_momentum": 0.9, "server_learning_rate": 0.7}),
    ("dp-server-fixed", {"base": {"name": "fedavgm", "server_momentum": 0.9}}),
    ("dp-server-adaptive", {"base": {"name": "fedadam"}}),
    ("dp-client-adaptive", {"base": {"name": "fedyogi"}}),
]


@pytest.mark.parametrize(("name", "params"), CASES, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("against_fresh", [True, False])
def test_resumed_to_the_same_bits(name: str, params: dict[str, Any], against_fresh: bool) -> None:
    def build() -> Strategy:
        return tiny.build(name, cohort=None if name == "fedxgbcyclic" else 6, **params)

    start = tiny.initial(name)
    whole = tiny.Rounds(build(), name)
    expected = whole.run(start, range(1, 5))

    first = tiny.Rounds(build(), name)
    half = first.run(start, range(1, 3))
    tensors, values = strategy_state.capture(first.strategy, build() if against_fresh else None)
    tensors, values = through_bytes(tensors, values)
    half_again = records.from_bytes(records.to_bytes(tiny.RecordDict({"arrays": half})))["arrays"]
    assert isinstance(half_again, ArrayRecord)
    resumed = tiny.Rounds(build(), name)
    strategy_state.restore(resumed.strategy, tensors, values)
    result = resumed.run(half_again, range(3, 5))

    assert first.cohorts + resumed.cohorts == whole.cohorts
    assert records.digest(result) == records.digest(expected)
    assert records.digest(result) != records.digest(half)


STATEFUL: list[tuple[str, dict[str, Any]]] = [
    ("fedavgm", {"server_momentum": 0.9}),
    *((name, {}) for name in ("fedadagrad", "fedadam", "fedyogi", "scaffold", "dp-server-adaptive")),
    ("dp-server-fixed", {"base": "fedadam"}),
]


@pytest.mark.parametrize(("name", "params"), STATEFUL)
def test_the_state_matters(name: str, params: dict[str, Any]) -> None:
    """Without it the same rounds end elsewhere, or the test above would prove nothing."""
    start = tiny.initial(name)
    expected = tiny.Rounds(tiny.build(name, cohort=6, **params), name).run(start, range(1, 5))
    half = tiny.Rounds(tiny.build(name, cohort=6, **params), name).run(start, range(1, 3))
    forgetful = tiny.Rounds(tiny.build(name, cohort=6, **params), name).run(half, range(3, 5))
    assert records.digest(forgetful) != records.digest(expected)


@pytest.mark.parametrize("name", tiny.STRATEGIES)
def test_a_new_strategy_has_no_state(name: str) -> None:
    empty: dict[str, Any] = {"attributes": {}}
    if name == "scaffold":
        empty = {"own": {"dict": [["control", {"dict": []}]]}}
    assert strategy_state.capture(tiny.build(name), tiny.build(name)) == ({}, {"strategy": empty})


# -- kinds of values ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    y: np.ndarray[Any, Any]


class Holder(FedAvg):
    """Keeps whatever it is given in one attribute."""

    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.held = held


def round_trip(held: Any, fresh: Any = None) -> Any:
    tensors, values = through_bytes(*strategy_state.capture(Holder(held), Holder(fresh)))
    other = Holder(fresh)
    strategy_state.restore(other, tensors, values)
    return other.held


@pytest.mark.parametrize(
    "held",
    [
        None,
        True,
        0,
        -(2**80),
        0.1,
        float("inf"),
        "text",
        b"",
        b"\x00bytes",
        [1, [2.0, None]],
        (1, ("a", b"b")),
        {"a": 1, "b": {"c": 2.0}},
        {3: "int keys", 1: "in their order"},
        {"dict": 1},
        {"object": {"attributes": {}}},
    ],
)
def test_plain_values(held: Any) -> None:
    result = round_trip(held, "something else")
    assert result == held
    assert type(result) is type(held)
    if isinstance(held, dict):
        assert list(result) == list(held)


def test_not_a_number_survives() -> None:
    assert np.isnan(round_trip(float("nan"), 0.0))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_arrays(dtype: str, shape: tuple[int, ...]) -> None:
    held = np.ones(shape, dtype)
    result = round_trip(held)
    assert result.dtype == held.dtype
    assert result.shape == held.shape
    assert np.array_equal(result, held)
    assert result.flags.writeable


def test_numpy_scalars() -> None:
    result = round_trip(np.float32(0.1))
    assert type(result) is np.float32
    assert result == np.float32(0.1)


def test_flower_records() -> None:
    arrays = records.array_record({"b": np.ones(2), "a": np.zeros((), np.int64)})
    result = round_trip({"arrays": arrays, "metrics": MetricRecord({"x": 0.1}), "config": ConfigRecord({"y": b"z"})})
    assert list(result["arrays"]) == ["b", "a"]
    assert records.digest(result["arrays"]) == records.digest(arrays)
    assert result["metrics"] == MetricRecord({"x": 0.1})
    assert result["config"] == ConfigRecord({"y": b"z"})


def test_paths_that_meet() -> None:
    held = {"a.b": np.zeros(1), "a": {"b": np.ones(1)}, "c": {1: np.full(1, 2.0), "1": np.full(1, 3.0)}}
    result = round_trip(held)
    assert (result["a.b"], result["a"]["b"], result["c"][1], result["c"]["1"]) == (0, 1, 2, 3)


def test_dataclasses_are_filled_in() -> None:
    result = round_trip(Point(1.0, np.ones(2)), Point(0.0, np.zeros(2)))
    assert isinstance(result, Point)
    assert result.x == 1.0
    assert np.array_equal(result.y, np.ones(2))


def test_objects_with_a_state_of_their_own() -> None:
    class Counter:
        def __init__(self) -> None:
            self.count, self.lock = 0, object()

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    used = Counter()
    used.count = 5
    assert round_trip(used, Counter()).count == 5


def test_functions_are_not_state() -> None:
    tensors, values = strategy_state.capture(Holder(lambda: 1), Holder(lambda: 2))
    assert (tensors, values) == ({}, {"strategy": {"attributes": {}}})


# -- what cannot be kept ------------------------------------------------------------------------------


class Opaque:
    def __init__(self, value: int = 0) -> None:
        self.value = value


@pytest.mark.parametrize(
    "make", [lambda: Opaque(1), lambda: {1, 2}, lambda: random.Random(0), lambda: [Opaque(1)], lambda: {(1, 2): 3}]
)
def test_what_cannot_be_stored_is_an_error(make: Callable[[], Any]) -> None:
    with pytest.raises(PluginError, match=r"'held.*state_dict\(\)") as caught:
        strategy_state.capture(Holder(make()), Holder())
    assert caught.value.code == "strategy-state"
    with pytest.raises(PluginError):
        strategy_state.capture(Holder(make()))


def test_what_is_as_it_was_built_need_not_be_stored() -> None:
    assert strategy_state.capture(Holder(Opaque(1)), Holder(Opaque(1)))[1] == {"strategy": {"attributes": {}}}
    assert strategy_state.capture(Holder({1, 2}), Holder({2, 1}))[1] == {"strategy": {"attributes": {}}}
    with pytest.raises(PluginError, match=r"'held' holds .*Opaque"):
        strategy_state.capture(Holder(Opaque(1)), Holder(Opaque(2)))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"strategy": {}},
        {"strategy": {"attributes": {"held": {"array": "missing"}}}},
        {"strategy": {"attributes": {"held": {"function": "os.system"}}}},
        {"strategy": {"attributes": {"aggregate_train": 1}}},
        {"strategy": {"attributes": {"__class__": 1}}},
        {"strategy": {"attributes": {"held": {"object": {"attributes": {"x": 1}}}}}},
    ],
)
def test_a_state_of_something_else(values: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="not a state of Holder") as caught:
        strategy_state.restore(Holder(), {}, values)
    assert caught.value.code == "checkpoint-strategy"
