"""Records: live arrays behave as Flower's, and their file format loses nothing."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trellis import records
from trellis.errors import DataError

DTYPES = st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8, np.bool_])
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
NAMES = st.text(min_size=1, max_size=12)
SCALARS = st.integers(-(2**62), 2**62) | st.floats(width=64)


@given(st.dictionaries(NAMES, ARRAYS, max_size=4), st.dictionaries(NAMES, SCALARS, max_size=3), st.binary(max_size=9))
@settings(max_examples=60, deadline=None)
def test_records_survive_their_file_format(arrays, metrics, blob):
    content = RecordDict({"m": MetricRecord(metrics), "c": ConfigRecord({"b": blob, "s": "text", "l": [1.5, 2.5]})})
    content["a"] = records.array_record(arrays)
    back = records.from_bytes(records.to_bytes(content))
    assert list(back) == list(content)
    assert records.digest(back.array_records["a"]) == records.digest(content.array_records["a"])
    assert dict(back.config_records["c"]) == dict(content.config_records["c"])
    for name, value in metrics.items():
        np.testing.assert_equal(back.metric_records["m"][name], value)


@pytest.mark.parametrize("blob", [b"", b"12345678", b"\x02" + b"\0" * 7 + b"{}", b"\xff" * 64, pickle.dumps([1])])
def test_other_bytes_are_refused(blob):
    with pytest.raises(DataError):
        records.from_bytes(blob)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_never_crash(data):
    blob = bytearray(records.to_bytes(RecordDict({"a": records.array_record({"w": np.arange(5.0)})})))
    blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        records.from_bytes(bytes(blob[: data.draw(st.integers(0, len(blob)))]))
    except DataError:
        pass


def test_a_live_array_is_what_flower_makes_of_it():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    ours, theirs = records.LiveArray(values), Array(values)
    assert ours.data == theirs.data
    assert (ours.dtype, ours.shape, ours.stype) == (theirs.dtype, theirs.shape, theirs.stype)
    assert ArrayRecord({"w": ours}).to_numpy_ndarrays()[0].tolist() == values.tolist()


def test_a_live_array_cannot_be_changed_through_its_copies():
    array = records.LiveArray(np.zeros(3))
    array.numpy()[:] = 1
    assert array.view().tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        array.view()[:] = 1


def test_live_restores_dtypes():
    like = records.array_record({"n": np.array(3, np.int64), "w": np.zeros(2, np.float32)})
    averaged = records.array_record({"n": np.array(3.6), "w": np.ones(2)})
    restored = records.live(averaged, like=like)
    assert restored["n"].dtype == "int64"
    assert restored["n"].numpy() == 4
    assert restored["w"].dtype == "float32"


def test_digest_sees_names_shapes_dtypes_and_values():
    base = {"w": np.zeros((2, 3), np.float32)}
    digests = {
        records.digest(records.array_record(arrays))
        for arrays in (
            base,
            {"v": base["w"]},
            {"w": base["w"].reshape(3, 2)},
            {"w": base["w"].astype(np.float64)},
            {"w": base["w"] + 1},
        )
    }
    assert len(digests) == 5
