"""The admission gate, with real clients on a ``LocalGrid`` and Flower's own FedAvg behind it."""

from __future__ import annotations

import io
import json
import pickle
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from trellis import flower
from trellis.grids import _checks, _cohort, screened
from trellis.grids.local import LocalGrid
from trellis.grids.screened import Screened
from trellis.records import LiveArray, array_record, digest, view
from trellis.scenario import Screening

FLIP_COHORT = 7
OFFENDER = 0  # the first to arrive: nobody has been seen before, and its dtype would be the aggregate's

Arrays = dict[str, np.ndarray[Any, Any]]
Misbehave = Callable[[Message, RecordDict], RecordDict | Message]


def global_model() -> Arrays:
    draw = np.random.default_rng(1)
    return {
        "conv.weight": draw.normal(0, 0.1, (16, 16)).astype(np.float32),
        "conv.bias": draw.normal(0, 0.1, 2).astype(np.float32),
        "batches": np.array(7),
    }


def honest_content(message: Message, client: int) -> RecordDict:
    """Train: a step in a common direction, and one of the client's own."""
    common, own = np.random.default_rng(2), np.random.default_rng(100 + client)
    arrays = {}
    for name, array in message.content["arrays"].items():
        values = view(array)
        step = common.normal(0, 0.05, values.shape) + own.normal(0, 0.02, values.shape)
        arrays[name] = (values + step).astype(values.dtype) if values.dtype.kind == "f" else values + 1
    return RecordDict(
        {
            "arrays": ArrayRecord({name: Array(np.asarray(values)) for name, values in arrays.items()}),
            "metrics": MetricRecord({"num-examples": 10 + client, "loss": 0.5}),
        }
    )


def make_app(misbehave: Misbehave | None = None, offenders: Iterable[int] = (OFFENDER,)) -> ClientApp:
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        content = honest_content(message, client)
        if misbehave is not None and client in offenders:
            result = misbehave(message, content)
            return result if isinstance(result, Message) else Message(result, reply_to=message)
        return Message(content, reply_to=message)

    for register in (app.train(), app.evaluate(), app.query()):
        register(answer)
    return app


def messages_to(clients: Iterable[int], kind: str = "train", model: Arrays | None = None) -> list[Message]:
    content = RecordDict({"arrays": array_record(model or global_model()), "config": ConfigRecord({"server-round": 1})})
    return [Message(content, flower.node_of(client), kind) for client in clients]


def aggregate(replies: Iterable[Message]) -> str | None:
    """Return the digest of FedAvg's model, or None if it made none."""
    arrays, _ = FedAvg().aggregate_train(1, replies)
    return None if arrays is None else digest(arrays)


def refusals(replies: Iterable[Message]) -> dict[int, str]:
    """Return the code of every refusal by client number."""
    return {
        flower.client_of(reply.metadata.src_node_id): reply.error.reason.partition(":")[0]
        for reply in replies
        if reply.has_error()
    }


# What an offender may do. Each takes the message and an honest reply's content, and spoils it.


def spoil(name: str, change: Callable[[Any], Any]) -> Misbehave:
    """Change one array. ``change`` takes its values and returns values or an ``Array``."""

    def misbehave(_: Message, content: RecordDict) -> RecordDict:
        changed = change(content["arrays"][name].numpy())
        content["arrays"][name] = changed if isinstance(changed, Array) else Array(np.asarray(changed))
        return content

    return misbehave


def put(value: float) -> Misbehave:
    def change(values: Any) -> Any:
        values.flat[3] = value
        return values

    return spoil("conv.weight", change)


def weigh(value: Any) -> Misbehave:
    def misbehave(_: Message, content: RecordDict) -> RecordDict:
        # Past MetricRecord's own check of types, as a foreign client could.
        content["metrics"].__dict__["_data"]["num-examples"] = value
        return content

    return misbehave


def stretch(factor: float) -> Misbehave:
    """Scale the update."""

    def misbehave(message: Message, content: RecordDict) -> RecordDict:
        for name in ("conv.weight", "conv.bias"):
            sent, own = view(message.content["arrays"][name]), content["arrays"][name].numpy()
            content["arrays"][name] = Array((sent + np.float32(factor) * (own - sent)).astype(np.float32))
        return content

    return misbehave


def edit(change: Callable[[RecordDict], object]) -> Misbehave:
    def misbehave(_: Message, content: RecordDict) -> RecordDict:
        change(content)
        return content

    return misbehave


def rename(content: RecordDict) -> None:
    content["arrays"]["conv.wieght"] = content["arrays"].pop("conv.weight")


def copy_of_the_model(message: Message, content: RecordDict) -> RecordDict:
    content["arrays"] = message.content["arrays"]
    return content


def lying_header(values: Any) -> Array:
    """Declare what was asked for, put 2**31 elements in the npy header, and send ten."""
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**31,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return Array("float32", values.shape, "numpy.ndarray", buffer.getvalue() + b"\0" * 40)


def lying_shape(values: Any) -> Array:
    return Array("float32", (2**31,), "numpy.ndarray", Array(values.flat[:10].copy()).data)


def object_payload(values: Any) -> Array:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return Array("float32", values.shape, "numpy.ndarray", buffer.getvalue())


def other_header(dtype: str, shape: tuple[int, ...]) -> Callable[[Any], Array]:
    """Send as many bytes as asked for, under a header that reads them as something else."""

    def change(values: Any) -> Array:
        return Array("float32", values.shape, "numpy.ndarray", Array(np.zeros(shape, dtype)).data)

    return change


def mislabelled(values: Any) -> Array:
    array = LiveArray(values.reshape(-1))
    array.shape = values.shape
    return array


def pickled(values: Any) -> Array:
    return Array("float32", values.shape, "numpy.ndarray", pickle.dumps(values))


def cut(values: Any) -> Array:
    return Array("float32", values.shape, "numpy.ndarray", Array(values).data[:-1])


def foreign(values: Any) -> Array:
    return Array("float32", values.shape, "torch.tensor", Array(values).data)


@dataclass(frozen=True)
class Case:
    """A misbehaviour, the code it must be refused with, and the check behind it, if one catches it as well."""

    code: str
    misbehave: Misbehave
    clients: int = 3
    backstop: str | None = None


CASES = {
    # Executed against Flower 1.41's weighted average, these turned the model into NaN, took it over, or ended the run.
    "nan in one array": Case("nonfinite", put(np.nan)),
    "inf in one array": Case("nonfinite", put(np.inf), backstop="norm"),
    "weight 1e18": Case("weight", weigh(10**18)),
    "weight -19": Case("weight", weigh(-19)),
    "weight nan": Case("weight", weigh(np.nan), backstop="metric-nonfinite"),
    "weights that sum to zero": Case("weight", weigh(-(11 + 12))),
    "shape (1,) for (2,)": Case("shape", spoil("conv.bias", lambda v: v[:1])),
    "shape (3,) for (2,)": Case("shape", spoil("conv.bias", lambda v: np.append(v, v[:1]))),
    "float64 first": Case("dtype", spoil("conv.weight", lambda v: v.astype(np.float64))),
    "float16 first": Case("dtype", spoil("conv.weight", lambda v: v.astype(np.float16))),
    "missing key": Case("names", edit(lambda c: c["arrays"].pop("conv.bias"))),
    # B1: arrays
    "subnormal flood": Case("subnormal", spoil("conv.weight", lambda v: (v * 1e-38).astype(np.float32))),
    "wrong key": Case("names", edit(rename)),
    "extra array": Case("names", edit(lambda c: c["arrays"].update(extra=Array(np.ones(2, np.float32))))),
    "zero arrays": Case("names", edit(lambda c: c["arrays"].clear())),
    "no array record": Case("names", edit(lambda c: c.pop("arrays"))),
    "second array record": Case("names", edit(lambda c: c.update(more=ArrayRecord([np.ones(2)])))),
    "0-d where 1-d is expected": Case("shape", spoil("conv.bias", lambda v: v[0])),
    "2**31 elements declared, ten sent": Case("shape", spoil("conv.weight", lying_shape), backstop="payload"),
    "2**31 elements in the header, ten sent": Case(
        "payload", spoil("conv.weight", lying_header), backstop="unreadable"
    ),
    "object array": Case("payload", spoil("conv.weight", object_payload), backstop="unreadable"),
    "header of another dtype": Case(
        "payload", spoil("conv.weight", other_header("int32", (16, 16))), backstop="unreadable"
    ),
    "header of another shape": Case(
        "payload", spoil("conv.weight", other_header("float32", (256,))), backstop="unreadable"
    ),
    "values of another shape": Case("payload", spoil("conv.weight", mislabelled), backstop="unreadable"),
    "pickle for npy": Case("payload", spoil("conv.weight", pickled), backstop="unreadable"),
    "one byte short": Case("payload", spoil("conv.weight", cut), backstop="unreadable"),
    "another serialisation": Case("payload", spoil("conv.weight", foreign), backstop="unreadable"),
    # B2: weights
    "weight 0": Case("weight", weigh(0)),
    "weight -1": Case("weight", weigh(-1)),
    "weight inf": Case("weight", weigh(np.inf), backstop="metric-nonfinite"),
    "weight a string": Case("weight", weigh("19"), backstop="unreadable"),
    "weight a list": Case("weight", weigh([19]), backstop="metric-names"),
    "weight true": Case("weight", weigh(True)),
    "weight missing": Case("weight", edit(lambda c: c["metrics"].pop("num-examples")), backstop="metric-names"),
    # B3: updates
    "norm x 1000": Case("norm", stretch(1000)),
    "sign flip": Case("direction", stretch(-1), clients=FLIP_COHORT),
    "constant": Case("constant", spoil("conv.weight", lambda v: np.full_like(v, 0.1))),
    "copy of the model": Case("unchanged", copy_of_the_model),
    # Metrics are averaged too, and Flower ends the run if their names differ.
    "nan loss": Case("metric-nonfinite", edit(lambda c: c["metrics"].update(loss=np.nan))),
    "loss too large for a float": Case("metric-nonfinite", edit(lambda c: c["metrics"].update(loss=10**400))),
    "another metric": Case("metric-names", edit(lambda c: c["metrics"].update(accuracy=0.5))),
    "metric a list": Case("metric-names", edit(lambda c: c["metrics"].update(loss=[0.5, 0.5]))),
    "no metrics": Case("metrics", edit(lambda c: c.pop("metrics")), backstop="unreadable"),
    "two metric records": Case("metrics", edit(lambda c: c.update(more=MetricRecord({"num-examples": 1})))),
}


@pytest.mark.battery("B1", "B2", "B3")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_offender_is_named_and_left_out_and_the_round_completes(case: Case) -> None:
    clients = range(case.clients)
    grid = Screened(LocalGrid(make_app(case.misbehave), case.clients), Screening())
    replies = grid.send_and_receive(messages_to(clients))

    assert refusals(replies) == {OFFENDER: case.code}
    assert len(list(replies)) == case.clients
    assert grid.offences == ({} if case.code in screened.PARDONED else {OFFENDER: 1})
    assert grid.counts == {case.code: 1}

    honest = LocalGrid(make_app(), case.clients).send_and_receive(messages_to(clients[1:]))
    assert aggregate(replies) == aggregate(honest) is not None


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_without_its_check_an_offender_gets_through(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is this very check that catches the case, not something before it."""
    for table in (_checks.CHECKS, _cohort.COHORT_CHECKS):
        monkeypatch.delitem(table, case.code, raising=False)
    grid = Screened(LocalGrid(make_app(case.misbehave), case.clients), Screening())
    replies = grid.send_and_receive(messages_to(range(case.clients)))
    assert refusals(replies) == ({OFFENDER: case.backstop} if case.backstop else {})


def test_every_check_has_a_case() -> None:
    assert {case.code for case in CASES.values()} == {*_checks.CHECKS, *_cohort.COHORT_CHECKS}


def test_when_all_weights_are_zero_all_are_refused_and_the_round_ends_without_a_model() -> None:
    grid = Screened(LocalGrid(make_app(weigh(0), range(3)), 3), Screening())
    replies = grid.send_and_receive(messages_to(range(3)))
    assert refusals(replies) == dict.fromkeys(range(3), "weight")
    assert aggregate(replies) is None


@pytest.mark.parametrize("lie", [lying_shape, lying_header])
def test_a_huge_array_is_refused_without_room_being_made_for_it(lie: Callable[[Any], Array]) -> None:
    messages = flower.number(messages_to([0]))
    reply = Message(spoil("conv.weight", lie)(messages[0], honest_content(messages[0], 0)), reply_to=messages[0])
    grid = Screened(Replay([reply]), Screening())
    tracemalloc.start()
    replies = grid.send_and_receive(messages)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(refusals(replies)) == [0]
    assert peak < 2**20


# The protocol: who answers what.


class Replay(LocalGrid):
    """A grid on which these replies come, whatever is sent."""

    def __init__(self, replies: Iterable[Message]) -> None:
        super().__init__(ClientApp(), 10)
        self.replies = list(replies)

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        flower.number(messages)
        return iter(self.replies)


def forge(**said: Any) -> Misbehave:
    """Send an honest reply under false metadata."""

    def misbehave(message: Message, content: RecordDict) -> Message:
        metadata = Message(content, reply_to=message).metadata
        metadata.__dict__.update({f"_{key}": value for key, value in said.items()})
        return Message(content=content, metadata=metadata)

    return misbehave


def say_nothing(message: Message, content: RecordDict) -> Message:
    reply = Message(content, reply_to=message)
    reply.__dict__["_content"] = None
    return reply


FORGERIES = {
    "a message never sent": forge(reply_to_message_id="m-none"),
    "another client": forge(src_node_id=flower.node_of(1)),
    "a node nobody knows": forge(src_node_id=5),
    "never sent, in another's name": forge(reply_to_message_id="m-none", src_node_id=flower.node_of(1)),
    "another run": forge(run_id=99),
    "nothing": say_nothing,
}


@pytest.mark.battery("B7")
@pytest.mark.parametrize("misbehave", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_reply_harms_only_its_sender(misbehave: Misbehave) -> None:
    grid = Screened(LocalGrid(make_app(misbehave), 3), Screening())
    replies = grid.send_and_receive(messages_to(range(3)))
    errors = [reply for reply in replies if reply.has_error()]
    assert [flower.client_of(reply.metadata.src_node_id) for reply in errors] == [OFFENDER]
    assert grid.counts == {"protocol": 1}
    assert set(grid.offences) <= {OFFENDER}
    honest = LocalGrid(make_app(), 3).send_and_receive(messages_to([1, 2]))
    assert aggregate(replies) == aggregate(honest) is not None


@pytest.mark.parametrize("name", ["another client", "a node nobody knows", "another run"])
def test_without_the_ledger_a_forged_reply_gets_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screened._Ledger, "breach", lambda *_: None)
    grid = Screened(LocalGrid(make_app(FORGERIES[name]), 3), Screening())
    assert not refusals(grid.send_and_receive(messages_to(range(3))))


def test_a_second_reply_is_dropped() -> None:
    messages = flower.number(messages_to(range(3)))
    replies = LocalGrid(make_app(), 3).send_and_receive(messages)
    grid = Screened(Replay([*replies, *replies]), Screening())
    admitted = grid.send_and_receive(messages)
    assert [id(reply) for reply in admitted] == [id(reply) for reply in replies]
    assert grid.counts == {"duplicate": 3}
    assert grid.offences == {}


def test_a_forger_that_comes_first_does_not_take_the_true_clients_place() -> None:
    messages = flower.number(messages_to(range(3)))
    replies = list(LocalGrid(make_app(), 3).send_and_receive(messages))
    forged = forge(src_node_id=flower.node_of(2))(messages[0], honest_content(messages[0], 0))
    assert isinstance(forged, Message)
    grid = Screened(Replay([forged, *replies]), Screening())
    assert [id(reply) for reply in grid.send_and_receive(messages)] == [id(reply) for reply in replies]
    assert grid.offences == {}


def test_a_message_without_reply_gets_an_error() -> None:
    messages = flower.number(messages_to(range(3)))
    replies = list(LocalGrid(make_app(), 3).send_and_receive(messages))
    got = list(Screened(Replay(replies[1:]), Screening()).stream(messages))
    assert [reply.has_error() for reply in got] == [False, False, True]
    assert got[2].metadata.reply_to_message_id == messages[0].metadata.message_id
    assert len(list(Screened(Replay([]), Screening()).stream(messages))) == 3


def test_errors_of_clients_pass_untouched() -> None:
    messages = flower.number(messages_to(range(2)))
    replies = [flower.failure(message, flower.FAILED_CLIENT, "ValueError: no") for message in messages]
    grid = Screened(Replay(replies), Screening())
    assert [id(reply) for reply in grid.stream(messages)] == [id(reply) for reply in replies]
    assert grid.offences == {}


def test_pushed_messages_are_screened_when_they_are_pulled() -> None:
    grid = Screened(LocalGrid(make_app(put(np.nan)), 3), Screening())
    ids = list(grid.push_messages(messages_to(range(3))))
    assert refusals(grid.pull_messages(ids[:1])) == {OFFENDER: "nonfinite"}
    assert refusals(grid.pull_messages(ids)) == {}


# Evaluate, query, and replies that are not the arrays that were sent.

BAD_EVALUATIONS = {
    "weight 0": ("weight", weigh(0)),
    "nan loss": ("metric-nonfinite", edit(lambda c: c["metrics"].update(loss=np.nan))),
    "another metric": ("metric-names", edit(lambda c: c["metrics"].update(accuracy=0.5))),
    "no metrics": ("metrics", edit(lambda c: c.pop("metrics"))),
    "object array": ("payload", spoil("conv.weight", object_payload)),
}


@pytest.mark.parametrize(("code", "misbehave"), BAD_EVALUATIONS.values(), ids=BAD_EVALUATIONS)
def test_a_bad_evaluation_is_refused(code: str, misbehave: Misbehave) -> None:
    grid = Screened(LocalGrid(make_app(misbehave), 3), Screening())
    replies = grid.send_and_receive(messages_to(range(3), "evaluate"))
    assert refusals(replies) == {OFFENDER: code}
    assert FedAvg().aggregate_evaluate(1, replies) == {"loss": 0.5}
    assert grid.measured == {}


def test_a_query_may_answer_anything_that_can_be_read() -> None:
    grid = Screened(LocalGrid(make_app(edit(lambda c: c.pop("metrics"))), 2), Screening())
    assert not refusals(grid.send_and_receive(messages_to(range(2), "query")))
    grid = Screened(LocalGrid(make_app(spoil("conv.weight", object_payload)), 2), Screening())
    assert refusals(grid.send_and_receive(messages_to(range(2), "query"))) == {OFFENDER: "payload"}


def as_version_3(values: Any) -> bytes:
    data = bytearray(Array(values).data)
    data[6] = 3
    return bytes(data)


@pytest.mark.parametrize(
    ("dtype", "shape", "data"),
    [
        ("float32", (-1, 16), None),
        ("float32", (True, 4), None),
        ("object", (1,), None),
        ("no such", (1,), None),
        ("U3", (1,), None),
        ("f4,f4", (1,), None),
        ("float32", (16, 16), as_version_3(np.zeros((16, 16), np.float32))),
        ("float32", (16, 16), b""),
        ("float32", (16, 16), b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70_000),
    ],
    ids=["negative", "boolean", "object", "unknown", "text", "structured", "version 3", "empty", "deep header"],
)
def test_a_malformed_array_is_refused_even_where_nothing_is_expected(
    dtype: str, shape: tuple[int, ...], data: bytes | None
) -> None:
    def malformed(values: Any) -> Array:
        return Array(dtype, shape, "numpy.ndarray", Array(values).data if data is None else data)

    grid = Screened(LocalGrid(make_app(spoil("conv.weight", malformed)), 2), Screening())
    assert refusals(grid.send_and_receive(messages_to(range(2), "query"))) == {OFFENDER: "payload"}


@pytest.mark.parametrize(
    ("sizes", "code"), [((5, 8), None), ((5,), "shape"), ((5, 9), "shape")], ids=["fits", "0-d short", "too wide"]
)
@pytest.mark.parametrize("kind", ["train", "query"])
def test_expected_arrays_may_differ_from_those_sent(kind: str, sizes: tuple[int, ...], code: str | None) -> None:
    def prototypes(_: Message, content: RecordDict) -> RecordDict:
        content["prototypes"] = array_record({"mean": np.ones(sizes, np.float32)})
        del content["arrays"]
        return content

    expected = {"prototypes": {"mean": ((None, 8), "float32")}}
    grid = Screened(LocalGrid(make_app(prototypes), 1), Screening(), expected=lambda _: expected)
    replies = grid.send_and_receive(messages_to([0], kind))
    assert refusals(replies) == ({OFFENDER: code} if code else {})


def test_an_array_in_fortran_order_is_read_as_such() -> None:
    turned = spoil("conv.weight", lambda v: Array(np.asfortranarray(v)))
    plain = Screened(LocalGrid(make_app(), 3), Screening())
    fortran = Screened(LocalGrid(make_app(turned), 3), Screening())
    assert not refusals(plain.send_and_receive(messages_to(range(3))))
    assert not refusals(fortran.send_and_receive(messages_to(range(3))))
    assert list(plain.measured.values()) == list(fortran.measured.values())


# Memory over rounds: norms, offences, quarantine.


def test_after_enough_offences_a_client_is_not_read_any_more() -> None:
    grid = Screened(LocalGrid(make_app(put(np.nan)), 3), Screening(quarantine_after=2))
    for _ in range(2):
        assert refusals(grid.send_and_receive(messages_to(range(3)))) == {OFFENDER: "nonfinite"}
    assert refusals(grid.send_and_receive(messages_to(range(3)))) == {OFFENDER: "quarantined"}
    assert grid.offences == {OFFENDER: 2}
    assert grid.counts == {"nonfinite": 2, "quarantined": 1}

    resumed = Screened(LocalGrid(make_app(), 3), Screening(quarantine_after=2))
    resumed.load_state(json.loads(json.dumps(grid.state())))
    assert resumed.state() == grid.state()
    assert refusals(resumed.send_and_receive(messages_to(range(3)))) == {OFFENDER: "quarantined"}


def test_norms_of_earlier_rounds_count_and_survive_a_checkpoint() -> None:
    alone = Screened(LocalGrid(make_app(stretch(1000)), 3), Screening())
    assert not refusals(alone.send_and_receive(messages_to([OFFENDER, 1]))), "two norms have no median to trust"

    grid = Screened(LocalGrid(make_app(), 3), Screening())
    grid.send_and_receive(messages_to(range(3)))
    resumed = Screened(LocalGrid(make_app(stretch(1000)), 3), Screening())
    resumed.load_state(json.loads(json.dumps(grid.state())))
    assert refusals(resumed.send_and_receive(messages_to([OFFENDER, 1]))) == {OFFENDER: "norm"}


def test_a_change_of_pace_of_the_whole_cohort_is_no_offence() -> None:
    grid = Screened(LocalGrid(make_app(), 8), Screening())
    grid.send_and_receive(messages_to(range(8)))
    grid.inner = LocalGrid(make_app(stretch(50), range(8)), 8)
    assert not refusals(grid.send_and_receive(messages_to(range(8))))


def test_norm_and_cosine_are_told_for_every_update() -> None:
    grid = Screened(LocalGrid(make_app(stretch(-1)), FLIP_COHORT), Screening())
    messages = messages_to(range(FLIP_COHORT))
    grid.send_and_receive(messages)
    assert list(grid.measured) == [message.metadata.message_id for message in messages]
    cosines = [cosine for _, cosine in grid.measured.values()]
    assert cosines[0] is not None
    assert cosines[0] < -0.5
    assert all(cosine is not None and cosine > 0.5 for cosine in cosines[1:])
    sent, own = global_model(), honest_content(messages[0], 1)["arrays"]
    floats = ("conv.weight", "conv.bias")
    norm = np.sqrt(sum(np.sum((own[n].numpy() - sent[n]).astype(np.float64) ** 2) for n in floats))
    assert list(grid.measured.values())[1][0] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("offenders", [{0, 1}, {0, 9}, {4, 5}, {5, 6}, {6, 11}])
def test_two_sign_flips_among_twelve_are_seen_wherever_they_stand(offenders: set[int]) -> None:
    grid = Screened(LocalGrid(make_app(stretch(-1), offenders), 12), Screening())
    assert refusals(grid.send_and_receive(messages_to(range(12)))) == dict.fromkeys(offenders, "direction")


def test_a_refused_update_leaves_no_trace_in_the_cohorts_direction() -> None:
    grid = Screened(LocalGrid(make_app(stretch(-1)), FLIP_COHORT), Screening())
    grid.send_and_receive(messages_to(range(FLIP_COHORT)))
    alone = Screened(LocalGrid(make_app(), FLIP_COHORT), Screening())
    alone.send_and_receive(messages_to(range(1, FLIP_COHORT)))
    for with_offender, without in zip([*grid.measured.values()][1:], alone.measured.values(), strict=True):
        assert with_offender == pytest.approx(without, rel=1e-5)


def test_admitted_replies_keep_their_order_and_their_identity() -> None:
    messages = flower.number(messages_to(range(12)))
    replies = list(LocalGrid(make_app(put(np.nan), {3, 8}), 12).send_and_receive(messages))
    admitted = [r for r in Screened(Replay(replies), Screening()).stream(messages) if r.has_content()]
    assert [id(r) for r in admitted] == [id(r) for i, r in enumerate(replies) if i not in {3, 8}]


def test_at_most_six_replies_are_held_back() -> None:
    came: list[Message] = []
    grid = Screened(LocalGrid(make_app(), 20, after_reply=came.append), Screening())
    behind = [len(came) - passed for passed, _ in enumerate(grid.stream(messages_to(range(20))))]
    assert max(behind) == _cohort.HOLD
    assert behind[-1] == 1


def test_decisions_depend_on_the_order_of_arrival_alone() -> None:
    seen = []
    for _ in range(2):
        grid = Screened(LocalGrid(make_app(stretch(-1), {2, 7}), 12), Screening())
        replies = grid.send_and_receive(messages_to([3, 2, 9, 0, 1, 7, 5, 4, 11, 6, 8, 10]))
        order = [(flower.client_of(reply.metadata.src_node_id), reply.has_error()) for reply in replies]
        seen.append((order, list(grid.measured.values())))
    assert seen[0] == seen[1]


def test_switched_off_everything_passes() -> None:
    grid = Screened(LocalGrid(make_app(put(np.nan)), 3), Screening(enabled=False))
    assert not refusals(grid.send_and_receive(messages_to(range(3))))


@pytest.mark.parametrize(
    ("misbehave", "off"),
    [
        (stretch(1000), Screening(max_norm_ratio=None)),
        (stretch(-1), Screening(min_cosine=None)),
        (copy_of_the_model, Screening(allow_unchanged=True)),
        (weigh(10**18), Screening(max_examples=10**19)),
    ],
    ids=["norm", "direction", "unchanged", "weight"],
)
def test_settings_loosen_their_check(misbehave: Misbehave, off: Screening) -> None:
    grid = Screened(LocalGrid(make_app(misbehave), FLIP_COHORT), off)
    assert not refusals(grid.send_and_receive(messages_to(range(FLIP_COHORT))))


# Honest clients are never refused, however little they have in common.


def from_updates(updates: list[np.ndarray[Any, Any]]) -> Misbehave:
    """Client k answers with the model plus ``updates[k]``."""

    def answer(message: Message, content: RecordDict) -> RecordDict:
        update = updates[flower.client_of(message.metadata.dst_node_id)]
        content["arrays"] = array_record(
            {n: (view(a) + update).astype(np.float32) for n, a in message.content["arrays"].items()}
        )
        return content

    return answer


def refused_updates(updates: list[np.ndarray[Any, Any]]) -> dict[int, str]:
    clients = range(len(updates))
    model: Arrays = {"weight": np.zeros(updates[0].shape, np.float32)}
    grid = Screened(LocalGrid(make_app(from_updates(updates), clients), len(updates)), Screening())
    return refusals(grid.send_and_receive(messages_to(clients, model=model)))


@given(
    seed=st.integers(0, 2**32 - 1),
    clients=st.integers(1, 16),
    size=st.integers(200, 1000),
    common=st.floats(0, 2),
    spread=st.floats(1, 5),
    scale=st.floats(1e-6, 1e3),
)
@settings(max_examples=40, deadline=None)
def test_honest_cohorts_are_never_refused(
    seed: int, clients: int, size: int, common: float, spread: float, scale: float
) -> None:
    draw = np.random.default_rng(seed)
    shared = common * draw.normal(size=size)
    updates = [scale * draw.uniform(1, spread) * (shared + draw.normal(size=size)) for _ in range(clients)]
    assert refused_updates(updates) == {}


@pytest.mark.parametrize("pair", [(0, 1), (0, 5), (4, 11), (10, 11)])
def test_two_clients_of_opposite_skew_are_not_refused(pair: tuple[int, int]) -> None:
    draw = np.random.default_rng(4)
    shared, skew = draw.normal(size=500), 2 * draw.normal(size=500)
    updates = [shared + draw.normal(size=500) for _ in range(12)]
    updates[pair[0]] += skew
    updates[pair[1]] -= skew
    assert refused_updates(updates) == {}


def test_two_camps_that_pull_against_each_other_are_not_refused() -> None:
    draw = np.random.default_rng(5)
    camp = draw.normal(size=500)
    updates = [(-1) ** client * camp + 0.3 * draw.normal(size=500) for client in range(12)]
    assert refused_updates(updates) == {}


def test_where_clients_hardly_agree_dissent_is_no_offence() -> None:
    draw = np.random.default_rng(7)
    shared = draw.normal(size=500)
    updates = [shared + 3 * draw.normal(size=500) for _ in range(10)]
    updates.append(-np.sum(updates, axis=0) / 4)
    assert refused_updates(updates) == {}


def test_a_model_that_was_subnormal_when_it_was_sent_may_stay_so() -> None:
    draw = np.random.default_rng(8)
    updates = [1e-40 * (1 + draw.uniform(size=500)) for _ in range(3)]
    grid = Screened(LocalGrid(make_app(from_updates(updates), range(3)), 3), Screening())
    tiny: Arrays = {"weight": np.full(500, 1e-40, np.float32)}
    assert refusals(grid.send_and_receive(messages_to(range(3), model=tiny))) == {}
    assert refused_updates(updates) == dict.fromkeys(range(3), "subnormal")


def test_updates_of_a_handful_of_numbers_have_no_direction_to_be_judged_by() -> None:
    updates = [np.array([1.0, 0.5])] * 8 + [np.array([-1.0, -0.5])]
    assert refused_updates(updates) == {}


def test_clients_with_one_class_each_train_together_unrefused() -> None:
    """Softmax regression on ten Gaussian classes, one class per client: as skewed as labels get."""
    classes, size = 10, 20
    draw = np.random.default_rng(6)
    centres = draw.normal(0, 1, (classes, size))
    data = [centre + draw.normal(0, 1, (50, size)) for centre in centres]

    def train(message: Message, content: RecordDict) -> RecordDict:
        label = flower.client_of(message.metadata.dst_node_id) % classes
        weights = message.content["arrays"]["weight"].numpy()
        for _ in range(5):
            logits = data[label] @ weights
            chances = np.exp(logits - logits.max(1, keepdims=True))
            chances /= chances.sum(1, keepdims=True)
            chances[:, label] -= 1
            weights = weights - 0.1 * data[label].T @ chances / 50
        content["arrays"] = array_record({"weight": weights.astype(np.float32)})
        return content

    grid = Screened(LocalGrid(make_app(train, range(20)), 20), Screening())
    model: Arrays = {"weight": np.zeros((size, classes), np.float32)}
    for turn in range(10):
        cohort = np.random.default_rng(turn).permutation(20)[:10]
        replies = grid.send_and_receive(messages_to(map(int, cohort), model=model))
        assert refusals(replies) == {}
        arrays, _ = FedAvg().aggregate_train(turn, replies)
        assert arrays is not None
        model = {"weight": arrays["weight"].numpy()}
