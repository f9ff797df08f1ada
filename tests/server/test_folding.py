"""The running mean against Flower's average, against plain FedAvg bit by bit, and what it holds meanwhile."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

import oracle_fedavg
import tiny_federation as tiny
from trellis import flower, records, seeding
from trellis.errors import RoundError
from trellis_server import folding

flower.enter_run()
FOLDING = ["fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "scaffold", "ccvr"]


def reply(
    arrays: dict[str, Any], examples: float = 1, client: int = 0, *, loss: Any = 0.5, record: str = "arrays"
) -> Message:
    sent = Message(RecordDict(), flower.node_of(client), "train")
    metrics = MetricRecord({"num-examples": examples, "loss": loss})
    values = {name: np.asarray(value) for name, value in arrays.items()}
    content = RecordDict({record: records.array_record(values), "metrics": metrics})
    content["trellis.timing"] = ConfigRecord({"seconds": 1.0})
    return flower.reply(content, sent)


def failed(client: int) -> Message:
    return flower.failure(Message(RecordDict(), flower.node_of(client), "train"), flower.FAILED_CLIENT, "no battery")


def mean(messages: list[Message]) -> dict[str, np.ndarray[Any, Any]]:
    (average,) = (m for m in folding.fold(messages, "num-examples") if not m.has_error())
    return {name: records.view(array) for name, array in average.content["arrays"].items()}


def some_replies(count: int, dtype: str = "float32", size: int = 1000) -> list[Message]:
    generator = np.random.default_rng(3)
    return [
        reply({"w": generator.normal(size=(size, 3)).astype(dtype)}, int(generator.integers(1, 10**6)), client)
        for client in range(count)
    ]


# -- which strategies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.STRATEGIES)
def test_who_folds(name: str) -> None:
    assert folding.folds(tiny.build(name)) == (name in FOLDING)


def test_unknown_subclasses_and_metrics_do_not_fold() -> None:
    class Mine(FedAvg):
        pass

    assert not folding.folds(Mine())
    assert not folding.folds(FedAvg(train_metrics_aggr_fn=lambda contents, key: MetricRecord()))
    assert folding.folds(FedAvg(evaluate_metrics_aggr_fn=lambda contents, key: MetricRecord()))


# -- the same as elsewhere ----------------------------------------------------------------------------


def test_bits_of_plain_fedavg() -> None:
    """Three rounds with cohorts of five over the grid: the bits of numpy alone."""
    rounds = tiny.Rounds(tiny.build("fedavg", cohort=5))
    start = tiny.initial("fedavg")
    result = rounds.run(start, range(1, 4))
    counts = {client: tiny.examples(client) for client in range(tiny.CLIENTS)}
    initial = {name: array.numpy() for name, array in start.items()}
    expected = oracle_fedavg.fedavg(initial, tiny.train, rounds.cohorts, counts)
    assert records.digest(result) == records.digest(records.array_record(expected))


def test_oracle_is_the_textbook_mean() -> None:
    updates = [{"w": records.view(m.content["arrays"]["w"])} for m in some_replies(7)]
    counts = [3, 1, 4, 1, 5, 9, 2]
    textbook = sum(n * u["w"].astype(np.float64) for n, u in zip(counts, updates, strict=True)) / sum(counts)
    np.testing.assert_allclose(oracle_fedavg.average(updates, counts)["w"], textbook, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FOLDING)
def test_the_same_as_without_folding(name: str) -> None:
    start = tiny.initial(name)
    folded, listed = (tiny.Rounds(tiny.build(name, cohort=5), name, fold=fold) for fold in (True, False))
    assert folded.fold
    assert not listed.fold
    one, other = folded.run(start, range(1, 4)), listed.run(start, range(1, 4))
    assert folded.cohorts == listed.cohorts
    for key in start:
        np.testing.assert_allclose(records.view(one[key]), records.view(other[key]), rtol=2e-5, atol=2e-5)
    for a, b in zip(folded.metrics, listed.metrics, strict=True):
        assert a is not None
        assert b is not None
        assert dict(a) == pytest.approx(dict(b))
        assert "num-examples" not in a


def test_flower_does_not_change_a_bit_of_the_average() -> None:
    messages = folding.fold(some_replies(5), "num-examples")
    arrays, metrics = FedAvg().aggregate_train(1, messages)
    assert arrays is not None
    assert metrics is not None
    assert records.digest(arrays) == records.digest(messages[0].content["arrays"])
    assert metrics["loss"] == messages[0].content["metrics"]["loss"]


@pytest.mark.parametrize("name", FOLDING)
@pytest.mark.parametrize("messages", [0, 1, 4])
def test_the_short_way_is_the_same(name: str, messages: int) -> None:
    """``aggregate`` on folded replies, some of them errors, against the strategy's own ``aggregate_train``."""

    def merged(short: bool) -> tuple[str | None, dict[str, Any] | None]:
        rounds = tiny.Rounds(tiny.build(name), name)
        sent = list(rounds.strategy.configure_train(1, tiny.initial(name), ConfigRecord(), rounds.grid))[:messages]
        averages = [*folding.folded(rounds.strategy, rounds.grid.stream(sent)), failed(7)]
        merge = rounds.strategy.aggregate_train
        arrays, metrics = folding.aggregate(rounds.strategy, 1, averages) if short else merge(1, averages)
        return arrays and records.digest(arrays), metrics and dict(metrics)

    with seeding.scoped(0):
        short = merged(True)
    with seeding.scoped(0):
        assert short == merged(False)
    assert (short[0] is None) == (messages == 0)


# -- arithmetic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("examples", [1, 3, 999_983])
def test_one_reply_is_its_own_mean(dtype: str, examples: int) -> None:
    message = some_replies(1, dtype)[0]
    message.content["metrics"]["num-examples"] = examples
    before = records.digest(message.content["arrays"])
    (average,) = folding.fold([message], "num-examples")
    assert records.digest(average.content["arrays"]) == before
    assert average.content["metrics"]["num-examples"] == examples
    assert average.metadata.src_node_id == message.metadata.src_node_id


def test_equal_replies_are_their_own_mean() -> None:
    values = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    result = mean([reply({"w": values.copy()}, n, n) for n in (1, 10, 7, 999_983)])
    assert np.array_equal(result["w"], values)


@pytest.mark.parametrize("examples", [(1, 1_000_000), (1_000_000, 1)])
def test_large_values_do_not_overflow(examples: tuple[int, int]) -> None:
    large = np.array([3e38, -3e38, 1e-44], np.float32)
    result = mean([reply({"w": large}, examples[0]), reply({"w": large * np.float32(0.5)}, examples[1])])
    assert np.isfinite(result["w"]).all()
    weight = examples[0] / sum(examples)
    np.testing.assert_allclose(result["w"][:2], large[:2] * (0.5 + 0.5 * weight), rtol=1e-6)


@pytest.mark.parametrize("cohort", [2, 100])
def test_accuracy(cohort: int) -> None:
    messages = some_replies(cohort, size=200_000 // cohort)
    n = np.array([m.content["metrics"]["num-examples"] for m in messages], dtype=float)
    exact = sum(
        w * records.view(m.content["arrays"]["w"]).astype(float) for w, m in zip(n / n.sum(), messages, strict=True)
    )
    error = np.abs(mean(messages)["w"] - exact).max()
    assert 0 < error < 8 * np.finfo(np.float32).eps


def test_half_precision_is_averaged_in_single() -> None:
    # Near 1000 a float16 moves in steps of a half: a mean kept in it would stand still at 1000.5.
    messages = [reply({"w": np.full(3, 1000 if client == 0 else 1001, np.float16)}, 1, client) for client in range(400)]
    result = mean(messages)
    assert result["w"].dtype == np.float16
    assert np.array_equal(result["w"], np.full(3, 1001, np.float16))


def test_integers_booleans_and_scalars() -> None:
    messages = [
        reply({"steps": np.int64(10), "mask": np.array([True, False]), "scale": np.float32(1)}, 1),
        reply({"steps": np.int64(13), "mask": np.array([True, True]), "scale": np.float32(4)}, 2),
    ]
    result = mean(messages)
    assert (result["steps"].dtype, result["steps"].shape, result["scale"].dtype) == (np.float64, (), np.float32)
    assert result["steps"] == 12.0
    assert result["scale"] == 3.0
    np.testing.assert_allclose(result["mask"], [1.0, 2 / 3])


def test_strided_empty_and_large_arrays() -> None:
    a = np.arange(3 * folding.BLOCK, dtype=np.float32).reshape(3, -1)
    messages = [reply({"t": a.T, "e": np.zeros((0, 4))}, 1), reply({"t": 3 * a.T, "e": np.zeros((0, 4))}, 1)]
    result = mean(messages)
    assert np.array_equal(result["t"], 2 * a.T)
    assert result["e"].shape == (0, 4)


def test_order_matters_to_the_last_bits_only() -> None:
    messages = some_replies(6)
    assert np.array_equal(mean(messages)["w"], mean(messages)["w"])
    random.Random(1).shuffle(messages)
    np.testing.assert_allclose(mean(messages)["w"], mean(some_replies(6))["w"], atol=1e-6)


def test_replies_are_not_changed() -> None:
    messages = some_replies(3)
    before = [records.digest(m.content["arrays"]) for m in messages]
    folding.fold(messages, "num-examples")
    assert [records.digest(m.content["arrays"]) for m in messages] == before


def test_metrics_are_weighted() -> None:
    messages = [reply({"w": [1.0]}, 1, 0, loss=[1.0, 0.0]), reply({"w": [1.0]}, 3, 1, loss=[2.0, 4.0])]
    (average,) = folding.fold(messages, "num-examples")
    assert dict(average.content["metrics"]) == {"num-examples": 4, "loss": [1.75, 3.0]}
    assert list(average.content.metric_records) == ["metrics"]


def test_equal_weights() -> None:
    messages = [reply({"w": [0.0]}, 1, 0, loss=0.0), reply({"w": [1.0]}, 3, 1, loss=1.0)]
    (average,) = folding.fold(messages, "num-examples", uniform=True)
    assert records.view(average.content["arrays"]["w"]) == 0.5
    assert average.content["metrics"]["loss"] == 0.75
    (again,) = folding.fold([average], "num-examples", uniform=True)
    assert dict(again.content[folding.FOLDED]) == dict(average.content[folding.FOLDED])
    with pytest.raises(AssertionError):
        folding.fold([average], "num-examples")


# -- errors and odd counts ----------------------------------------------------------------------------


def test_errors_are_passed_on() -> None:
    messages = [failed(4), *some_replies(2), failed(5)]
    average, *errors = folding.fold(messages, "num-examples")
    assert average.has_content()
    assert errors == [messages[0], messages[-1]]
    assert average.content[folding.FOLDED]["replies"] == 2
    assert folding.fold([failed(1)], "num-examples")[0].has_error()
    assert folding.fold([], "num-examples") == []


def test_zero_examples_count_nothing() -> None:
    messages = [reply({"w": [9.0]}, 0, 0, loss=9.0), reply({"w": [1.0]}, 2, 1), reply({"w": [7.0]}, 0, 2, loss=9.0)]
    (average,) = folding.fold(messages, "num-examples")
    assert records.view(average.content["arrays"]["w"]) == 1.0
    assert average.content["metrics"]["loss"] == 0.5
    with pytest.raises(RoundError, match="all 1 replies count zero examples"):
        folding.fold([reply({"w": [9.0]}, 0)], "num-examples")


@pytest.mark.parametrize("examples", [-1, float("nan"), float("inf"), [1, 2]])
def test_odd_counts_are_refused(examples: Any) -> None:
    messages = [reply({"w": [1.0]}, 1), reply({"w": [1.0]}, examples, 5)]
    with pytest.raises(RoundError, match=r"client 5 .*'num-examples'"):
        folding.fold(messages, "num-examples")


def test_replies_must_go_together() -> None:
    first = reply({"w": np.zeros(2)}, 1, 0)
    for other, what in (
        (reply({"w": np.zeros(1)}, 1, 3), r"'w' has shape \(1,\), not \(2,\)"),
        (reply({"v": np.zeros(2)}, 1, 3), "differ from the first reply's in 'v'"),
        (reply({"w": np.zeros(2), "x": np.zeros(2)}, 1, 3), "differ from the first reply's in 'x'"),
        (reply({"w": np.zeros(2)}, 1, 3, record="model"), r"ArrayRecords are \['model'\]"),
    ):
        with pytest.raises(RoundError, match=f"client 3 .*{what}"):
            folding.fold([first, other], "num-examples")
    other = reply({"w": np.zeros(2)}, 1, 3)
    other.content["metrics"]["accuracy"] = 1.0
    with pytest.raises(RoundError, match="its metrics are"):
        folding.fold([first, other], "num-examples")
    other.content["more"] = MetricRecord({"x": 1})
    with pytest.raises(RoundError, match="2 MetricRecords"):
        folding.fold([first, other], "num-examples")


# -- memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDING)
def test_a_reply_is_let_go_before_the_next_is_taken(name: str) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def replies() -> Iterator[Message]:
        nonlocal most
        for client in range(6):
            most = max(most, sum(ref() is not None for ref in alive))
            yield made(client)

    def made(client: int) -> Message:
        values = np.full((100, 100), client, np.float32)
        alive.append(weakref.ref(values))
        return reply({"w": values}, 1 + client, client)

    gc.disable()  # the collector would hide a cycle
    try:
        (average,) = folding.folded(tiny.build(name), replies())
    finally:
        gc.enable()
    assert len(alive) == 6
    assert most == 0
    assert isinstance(average.content["arrays"], ArrayRecord)
