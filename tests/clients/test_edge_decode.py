"""What comes over the wire becomes a batch, or a status: by cases, and by whatever hypothesis thinks of."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_edge import CLASSES, PREPROCESSING, SHAPE, images, request

from trellis_clients.edge import decode as wire
from trellis_clients.edge.decode import Expected, RequestError, decode, parse
from trellis_clients.edge.encode import OUTPUTS, encode, wanted
from trellis_clients.edge.generated import open_inference_pb2 as oip
from trellis_clients.edge.preprocessing import Preprocessing

EXPECTED = Expected("input", SHAPE, PREPROCESSING, 8)


def read(message, expected=EXPECTED):
    return decode(parse(message.SerializeToString()), expected)


def error(message, expected=EXPECTED) -> RequestError:
    data = message if isinstance(message, bytes) else message.SerializeToString()
    with pytest.raises(RequestError) as caught:
        decode(parse(data), expected)
    assert "\n" not in caught.value.message and len(caught.value.message) < 400
    return caught.value


# -- what is right ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("datatype", "dtype"), [("FP32", "<f4"), ("FP64", "<f8"), ("FP16", "<f2")])
def test_floats_go_to_the_model_as_they_are(datatype, dtype):
    x = images(3).astype(dtype)
    found = read(request(x, datatype=datatype))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, x.astype(np.float32))
    if datatype != "FP16":
        np.testing.assert_array_equal(read(request(x, datatype=datatype, raw=False)), found)


@pytest.mark.parametrize("datatype", list(wire.INTEGERS))
def test_integers_are_pixels(datatype):
    pixels = np.random.default_rng(1).integers(0, 128, (2, *SHAPE))
    x = pixels.astype(wire.INTEGERS[datatype])
    expected = (pixels / 255 - 0.5) / 0.25
    np.testing.assert_allclose(read(request(x, datatype=datatype)), expected, rtol=1e-5, atol=1e-6)
    typed = request(x[:0], datatype=datatype)
    del typed.raw_input_contents[:]
    typed.inputs[0].shape[0] = 2
    getattr(typed.inputs[0].contents, wire.TYPED[datatype]).extend(pixels.ravel().tolist())
    np.testing.assert_array_equal(read(typed), read(request(x, datatype=datatype)))


@given(st.floats(-1, 2), st.floats(0.05, 4))
def test_pixels_come_back_from_inputs(mean, std):
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    standard = Preprocessing((mean,), (std,))
    np.testing.assert_array_equal(standard.to_pixels(standard.to_inputs(pixels / np.float32(255))), pixels)


# -- what is wrong ----------------------------------------------------------------------------------------


def edited(change, x=None, **how):
    message = request(images(2) if x is None else x, **how)
    change(message)
    return message


def shape(*sizes):
    def change(message):
        message.inputs[0].shape[:] = sizes

    return change


def value(v):
    x = images(2)
    x[1, 0, 2, 3] = v
    return x


def to_raw(message):
    message.raw_input_contents.append(b"1234")


BAD = {
    "no input": (oip.ModelInferRequest(model_name="tiny"), "one input"),
    "two inputs": (edited(lambda m: m.inputs.add(name="other")), "has 2"),
    "wrong name": (request(images(2), name="image"), "no input is named 'image'"),
    "very long name": (request(images(2), name="n" * 100_000), "nnn..."),
    "wrong datatype": (request(images(2), datatype="BF16"), "datatype 'BF16'; allowed: FP16"),
    "no datatype": (request(images(2), datatype=""), "datatype ''"),
    "bytes": (request(images(2), datatype="BYTES"), "'BYTES'"),
    "wrong size": (edited(shape(2, 1, 4, 5)), "the model takes [n, 1, 4, 4]"),
    "wrong rank": (edited(shape(2, 16)), "shape [2, 16]"),
    "no shape": (edited(shape()), "shape []"),
    "negative": (edited(shape(-2, 1, 4, 4)), "shape [-2"),
    "negative twice": (edited(shape(2, -1, -4, 4)), "shape [2, -1"),
    "overflowing": (edited(shape(2**62, 2**62, 4, 4)), "the model takes"),
    "thousand dimensions": (edited(shape(*[1] * 1000)), "shape [1, 1"),
    "empty batch": (request(images(0)), "the batch is empty"),
    "truncated": (edited(lambda m: m.raw_input_contents.__setitem__(0, b"123")), "3 bytes of raw contents"),
    "too long": (edited(lambda m: m.raw_input_contents.__setitem__(0, bytes(129))), "takes 128"),
    "two raw contents": (edited(to_raw), "2 entries for one input"),
    "no contents": (edited(lambda m: m.raw_input_contents.pop()), "0 elements"),
    "raw and typed": (edited(to_raw, raw=False), "both raw_input_contents and typed"),
    "typed half": (
        edited(lambda m: m.inputs[0].contents.fp32_contents.__delitem__(slice(5)), raw=False),
        "27 elements",
    ),
    "typed elsewhere": (
        edited(lambda m: m.inputs[0].contents.int_contents.append(1), raw=False),
        "FP32 goes into fp32_contents, not into int_contents",
    ),
    "typed half floats": (
        edited(lambda m: m.raw_input_contents.pop(), images(2).astype("<f2"), datatype="FP16"),
        "FP16 has no typed contents",
    ),
    "NaN": (request(value(np.nan)), "NaN, infinite"),
    "infinite": (request(value(-np.inf)), "NaN, infinite"),
    "huge": (request(value(1e30)), "beyond"),
    "overflowing double": (request(value(0).astype("<f8") + 1e300, datatype="FP64"), "beyond"),
    "half infinity": (request(value(np.inf).astype("<f2"), datatype="FP16"), "infinite"),
    "pixel 256": (request(np.full((1, *SHAPE), 256, "<i8"), datatype="INT64"), "0..255"),
    "pixel -1": (request(np.full((1, *SHAPE), -1, "<i4"), datatype="INT32"), "0..255"),
    "typed pixel 256": (
        request(np.full((1, *SHAPE), 256), datatype="UINT8", raw=False),
        "0..255",
    ),
    "not protobuf": (b"\x0f\x01", "do not parse"),
    "group": (b"\x0b\x0c", "do not parse"),
    "cut off": (request(images(2)).SerializeToString()[:-7], "end too early"),
    "endless varint": (b"\x80" * 40, "end too early"),
    "not UTF-8": (b"\x0a\x02\xff\xfe", "do not parse"),
    "many fields": (b"\x2a\x00" * 65, "more than 64 fields"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_requests_are_invalid_arguments(case):
    message, says = BAD[case]
    found = error(message)
    assert found.code is StatusCode.INVALID_ARGUMENT
    assert says in found.message


def test_a_batch_over_the_limit_is_resource_exhausted():
    assert error(request(images(9))).code is StatusCode.RESOURCE_EXHAUSTED
    assert read(request(images(8))).shape == (8, *SHAPE)


def test_a_model_that_takes_no_images_takes_no_pixels():
    plain = Expected("input", SHAPE, None, 8)
    assert "allowed: FP16, FP32, FP64" in error(request(np.zeros((1, *SHAPE), "u1"), datatype="UINT8"), plain).message


def test_a_message_of_empty_messages_is_refused_before_it_takes_memory():
    """Parsed, these six megabytes would be three million messages."""
    before = _resident()
    for _ in range(3):
        assert "fields" in error(b"\x2a\x00" * 3_000_000).message
    assert _resident() - before < 30e6


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


# -- what nobody thought of -------------------------------------------------------------------------------

numbers = st.one_of(st.sampled_from([0, 1, 2, 4, -1, 2**31, 2**63 - 1, -(2**63)]), st.integers(-3, 20))
names = st.one_of(
    st.sampled_from(["input", "tiny", "logits", "FP32", "UINT8", "INT64", "FP16", ""]), st.text(max_size=8)
)
reals = st.floats(width=32)
parameters = st.dictionaries(
    st.one_of(st.just("classification"), names),
    st.builds(oip.InferParameter, int64_param=numbers) | st.builds(oip.InferParameter, string_param=names),
    max_size=2,
)
contents = st.builds(
    oip.InferTensorContents,
    fp32_contents=st.lists(reals, max_size=40),
    int_contents=st.lists(st.integers(-300, 300), max_size=20),
    int64_contents=st.lists(numbers, max_size=20),
    uint_contents=st.lists(st.integers(0, 2**32 - 1), max_size=20),
    fp64_contents=st.lists(st.floats(), max_size=20),
    bytes_contents=st.lists(st.binary(max_size=4), max_size=3),
)
shapes = st.one_of(st.just([1, *SHAPE]), st.just([2, *SHAPE]), st.lists(numbers, max_size=5))
inputs = st.builds(
    oip.ModelInferRequest.InferInputTensor,
    name=names | st.just("input"),
    datatype=names | st.just("FP32"),
    shape=shapes,
    parameters=parameters,
    contents=st.none() | contents,
)
outputs = st.builds(
    oip.ModelInferRequest.InferRequestedOutputTensor,
    name=names | st.sampled_from(sorted(OUTPUTS)),
    parameters=parameters,
)
messages = st.builds(
    oip.ModelInferRequest,
    model_name=names,
    inputs=st.lists(inputs, max_size=2),
    outputs=st.lists(outputs, max_size=3),
    raw_input_contents=st.lists(st.binary(max_size=140) | st.just(bytes(64)), max_size=2),
).map(lambda message: message.SerializeToString())
mutated = st.builds(
    lambda data, at, new, cut: data[: at % len(data)] + new + data[at % len(data) + cut :],
    st.sampled_from([request(images(n), raw=raw).SerializeToString() for n in (1, 2) for raw in (True, False)]),
    st.integers(0, 10_000),
    st.binary(max_size=6),
    st.integers(0, 6),
)
garbage = st.binary(max_size=300)


@settings(max_examples=600)
@given(messages | mutated | garbage)
def test_any_bytes_become_a_batch_or_a_status(data):
    """And a batch that is answered gets an answer that is of its size."""
    try:
        message = parse(data)
        asked = wanted(message)
        x = decode(message, EXPECTED)
    except RequestError as refusal:
        assert refusal.code in (StatusCode.INVALID_ARGUMENT, StatusCode.RESOURCE_EXHAUSTED)
        assert refusal.message and len(refusal.message.encode()) < 1000 and "\n" not in refusal.message
        return
    assert x.dtype == np.float32 and x.shape[1:] == SHAPE and 1 <= len(x) <= EXPECTED.most
    assert np.isfinite(x).all() and np.abs(x).max() <= wire.LARGEST
    logits = x.reshape(len(x), -1)[:, :3].astype(np.float32)
    response = encode(message, asked, logits, logits, CLASSES)
    assert [each.name for each in response.outputs] == [each.name for each in asked]
    assert all(each.shape[0] == len(x) for each in response.outputs)
    assert len(response.raw_output_contents) in (0, len(asked))


@settings(max_examples=200)
@given(messages)
def test_what_protobuf_reads_passes_the_count_of_fields(data):
    """The walk over the fields refuses nothing that is a request of ordinary size."""
    assert parse(data) == oip.ModelInferRequest.FromString(data)


# -- answers ----------------------------------------------------------------------------------------------

LOGITS = np.array([[1.0, 3.0, 2.0], [0.5, -1.0, 0.25]], np.float32)


def asking(*outputs, **how):
    message = request(images(2), **how)
    for name, top in outputs:
        output = message.outputs.add(name=name)
        if top is not None:
            output.parameters["classification"].int64_param = top
    return message


def test_all_outputs_are_answered_where_none_is_named():
    message = request(images(2))
    response = encode(message, wanted(message), LOGITS, LOGITS / 4, CLASSES)
    assert [(each.name, each.datatype, list(each.shape)) for each in response.outputs] == [
        ("logits", "FP32", [2, 3]),
        ("probabilities", "FP32", [2, 3]),
        ("labels", "BYTES", [2]),
    ]
    np.testing.assert_array_equal(np.frombuffer(response.raw_output_contents[1], "<f4").reshape(2, 3), LOGITS / 4)
    assert response.raw_output_contents[2] == b"".join(struct.pack("<I", 3) + name for name in (b"bee", b"ant"))


def test_typed_requests_get_typed_answers():
    message = asking(("labels", None), ("logits", None), raw=False)
    response = encode(message, wanted(message), LOGITS, LOGITS, CLASSES)
    assert not response.raw_output_contents
    assert list(response.outputs[0].contents.bytes_contents) == [b"bee", b"ant"]
    assert list(response.outputs[1].contents.fp32_contents) == LOGITS.ravel().tolist()


@pytest.mark.parametrize("top", [1, 2, 99])
def test_classification_names_the_best(top):
    message = asking(("logits", top), raw=False)
    (output,) = encode(message, wanted(message), LOGITS, LOGITS, CLASSES).outputs
    assert list(output.shape) == [2, min(top, 3)]
    best = [b"3.000000:1:bee", b"2.000000:2:cat", b"1.000000:0:ant"]
    assert list(output.contents.bytes_contents)[: min(top, 3)] == best[:top]


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ([("scores", None)], "no output is named 'scores'; there are logits, probabilities, labels"),
        ([("logits", None), ("logits", 2)], "asked for twice"),
        ([("logits", 0)], "at least 1"),
        ([("logits", -5)], "at least 1"),
        ([("labels", 2)], "cannot be classified"),
    ],
)
def test_outputs_that_cannot_be_are_refused(outputs, says):
    with pytest.raises(RequestError, match=says) as caught:
        wanted(asking(*outputs))
    assert caught.value.code is StatusCode.INVALID_ARGUMENT
