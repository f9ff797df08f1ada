"""The link's formats: records as bytes, payloads in chunks, shortened updates. No byte from outside is trusted."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trellis import records
from trellis.errors import DataError
from trellis.grids.grpc import from_wire, to_wire
from trellis.wire.content import DTYPES, Record, pack, unpack
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.payload import Receiver, chunks, encode
from trellis.wire.shortening import ERROR, restore, shorten

NUMBERS = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False)
TEXT = st.text(max_size=8)


def contents():
    array = st.sampled_from(sorted(DTYPES.values())).flatmap(
        lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_side=4))
    )
    values = st.dictionaries(TEXT, NUMBERS | TEXT | st.binary(max_size=8) | st.lists(NUMBERS, max_size=3), max_size=3)
    record = st.builds(lambda held: Record("arrays", held), st.dictionaries(TEXT, array, max_size=3)) | st.builds(
        lambda held: Record("config", held), values
    )
    return st.dictionaries(TEXT, record, max_size=3)


@settings(deadline=None, max_examples=150)
@given(contents())
def test_what_is_packed_comes_back(content):
    again = unpack(pack(content))
    assert list(again) == list(content)
    for name, record in content.items():
        assert again[name].kind == record.kind
        assert list(again[name].values) == list(record.values)
        for key, value in record.values.items():
            if record.kind == "arrays":
                assert again[name].values[key].dtype == value.dtype
                np.testing.assert_array_equal(again[name].values[key], value)
            else:
                assert again[name].values[key] == value
                assert type(again[name].values[key]) is type(value)


def test_the_format_is_that_of_run_folders():
    content = RecordDict(
        {
            "arrays": records.array_record(
                {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((), "i8")}
            ),
            "metrics": MetricRecord({"loss": 0.1, "num-examples": 7}),
            "config": ConfigRecord({"lr": 0.1, "text": "é", "raw": b"\0\xff", "many": [1, 2]}),
        }
    )
    for blob in (records.to_bytes(content), pack(to_wire(content))):
        for again in (records.from_bytes(blob), from_wire(unpack(blob))):
            assert again == content


def test_arrays_are_views_into_the_buffer():
    blob = pack({"a": Record("arrays", {"w": np.arange(1000.0)})})
    array = unpack(blob)["a"].values["w"]
    assert not array.flags.writeable
    assert not array.flags.owndata


@pytest.mark.battery("B8")
@settings(deadline=None, max_examples=400)
@given(st.data())
def test_damaged_bytes_are_refused_or_read_and_nothing_else(data):
    good = pack(
        {"a": Record("arrays", {"w": np.arange(8.0), "b": np.ones(3, bool)}), "m": Record("metrics", {"x": 1.5})}
    )
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    for blob in (bytes(damaged), bytes(damaged)[:cut], bytes(damaged) + b"\0" * (cut % 5)):
        try:
            unpack(blob)
        except DataError as error:
            assert error.code.startswith("records-")


@pytest.mark.battery("B8")
@given(st.binary(max_size=200))
def test_garbage_is_refused(blob):
    with pytest.raises(DataError):
        unpack(blob)


def test_overlapping_arrays_and_gaps_are_refused():
    blob = pack({"a": Record("arrays", {"w": np.zeros(4, "<f4"), "v": np.zeros(4, "<f4")})})
    for old, new in ((b"[16,32]", b"[12,28]"), (b"[16,32]", b"[20,36]"), (b'"shape":[4]', b'"shape":[8]')):
        assert old in blob
        with pytest.raises(DataError, match=r"lies at|takes|belong"):
            unpack(blob.replace(old, new, 1))
    three = pack({"a": Record("arrays", {name: np.zeros(4, "<f4") for name in "uvw"})})
    with pytest.raises(DataError, match="lies at"):  # a gap and an overlap that make up for one another
        unpack(three.replace(b"[16,32]", b"[32,48]", 1))


def test_objects_do_not_travel():
    with pytest.raises(DataError, match="object"):
        pack({"a": Record("arrays", {"w": np.array([object()])})})
    with pytest.raises(DataError, match="set"):
        pack({"a": Record("config", {"w": {1}})})


# -- payloads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [pb.ENCODING_NONE, pb.ENCODING_ZSTD])
@pytest.mark.parametrize("size", [0, 1, 20_000, 5_000_000])
def test_a_payload_arrives_in_memory_or_in_a_file(encoding, size):
    raw = np.random.default_rng(0).integers(0, 4, size, np.uint8).tobytes()
    payload, data = encode(raw, encoding)
    assert payload.digest == hashlib.sha256(data).hexdigest()
    receiver = Receiver(payload, limit=10_000_000)
    for chunk in chunks(data, size=70_000):
        receiver.add(chunk)
    buffer = receiver.finish()
    assert bytes(buffer) == raw
    assert isinstance(buffer, bytes) == (size < 4_000_001)


@pytest.mark.battery("B5")
def test_a_payload_that_claims_too_much_is_refused_before_a_byte_of_it():
    with pytest.raises(DataError, match="10000000000") as caught:
        Receiver(pb.Payload(size=10**10, decoded_size=10**10, encoding=pb.ENCODING_NONE), limit=10**9)
    assert caught.value.code == "payload-too-large"


@pytest.mark.battery("B4", "B5")
def test_few_bytes_that_stand_for_many_are_caught_on_the_way():
    payload, data = encode(bytes(50_000_000), pb.ENCODING_ZSTD)
    assert len(data) < 10_000
    payload.decoded_size = 1_000_000
    receiver = Receiver(payload, limit=10**9)
    with pytest.raises(DataError, match="more than the 1000000 bytes"):
        receiver.add(data)


@pytest.mark.battery("B5")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-1], "bytes came"),
        (lambda data: data + b"x", "more than"),
        (lambda data: data[:-1] + b"\1", "digest"),
    ],
)
def test_other_bytes_than_announced_are_refused(change, said):
    payload, data = encode(bytes(100_000))
    receiver = Receiver(payload, limit=10**6)

    def receive():
        receiver.add(change(data))
        receiver.finish()

    with pytest.raises(DataError, match=said):
        receive()


def test_bytes_after_the_end_are_refused_when_they_come():
    for encoding in (pb.ENCODING_NONE, pb.ENCODING_ZSTD):
        payload, data = encode(bytes(100_000), encoding)
        receiver = Receiver(payload, limit=10**6)
        receiver.add(data)
        with pytest.raises(DataError, match=f"more than the {len(data)} bytes"):
            receiver.add(b"x")


def test_bytes_that_are_not_zstd_are_refused():
    payload, data = encode(bytes(100_000), pb.ENCODING_ZSTD)
    receiver = Receiver(payload, limit=10**6)
    with pytest.raises(DataError, match="zstd"):
        receiver.add(b"\0" * len(data))


# -- shortening -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "worst"), [(pb.SHORTENING_FLOAT16, 1e-3), (pb.SHORTENING_INT8, 2e-2)])
def test_shortened_updates_are_close_and_say_how_close(how, worst):
    rng = np.random.default_rng(1)
    base = {"w": rng.normal(size=(50, 20)).astype("f4"), "b": rng.normal(size=20).astype("f4")}
    trained = {name: (value + 0.01 * rng.normal(size=value.shape)).astype("f4") for name, value in base.items()}
    sent = {"arrays": Record("arrays", base)}
    answer = {"arrays": Record("arrays", trained), "metrics": Record("metrics", {"num-examples": 3})}
    short = shorten(answer, sent, how)
    assert len(pack(short)) < len(pack(answer))
    back = restore(unpack(pack(short)), sent)
    lost = sum(np.square(back["arrays"].values[n].astype("f8") - trained[n]).sum() for n in base)
    whole = sum(np.square(trained[n].astype("f8") - base[n]).sum() for n in base)
    said = short["metrics"].values[ERROR]
    assert said == pytest.approx(np.sqrt(lost / whole), rel=0.05)
    assert 0 < said < worst
    assert back["arrays"].values["w"].dtype == np.float32


def test_what_is_not_an_update_travels_as_it_is():
    answer = {"statistics": Record("arrays", {"m": np.arange(3.0)}), "metrics": Record("metrics", {"x": 1})}
    assert shorten(answer, {}, pb.SHORTENING_INT8) == answer
    assert shorten(answer, {"statistics": answer["statistics"]}, pb.SHORTENING_NONE) is answer


def test_non_finite_updates_reach_the_gate_as_such():
    base = {"arrays": Record("arrays", {"w": np.zeros(3, "f4")})}
    answer = {"arrays": Record("arrays", {"w": np.array([1, np.nan, np.inf], "f4")})}
    back = restore(shorten(answer, base, pb.SHORTENING_INT8), base)["arrays"].values["w"]
    assert not np.isfinite(back).all()


def test_a_shortened_record_must_fit_what_was_sent():
    base = {"arrays": Record("arrays", {"w": np.zeros(3, "f4")})}
    short = shorten({"arrays": Record("arrays", {"w": np.ones(3, "f4")})}, base, pb.SHORTENING_INT8)
    for other in ({}, {"arrays": Record("arrays", {"w": np.zeros(4, "f4")})}, {"arrays": Record("config", {})}):
        with pytest.raises(DataError) as caught:
            restore(short, other)
        assert caught.value.code == "payload-shortened"
