"""Torch and ONNX Runtime as predictors: the same numbers, and what a model file may not be."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import numpy as np
import onnx
import pytest
import torch
from exported import CLASSES, KNOWN, LARGE, TRANSFORMERS, WITH_BATCH_NORM, ZOO, blob, examples, fresh, reference, served
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from trellis.errors import TrellisError
from trellis_clients.edge.folding import fold
from trellis_clients.edge.model_file import Limits, read
from trellis_clients.edge.session import OnnxPredictor
from trellis_clients.torch_predictor import TorchPredictor


def close(ours, theirs, tolerance=1e-4):
    for name in ("logits", "features", "activations"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == np.float32
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max()), name


def other_affine(predictor, seed=3):
    generator = np.random.default_rng(seed)
    return {
        name: values + generator.normal(0, 0.1, values.shape).astype(np.float32)
        for name, values in predictor.affine().items()
    }


# -- the same numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ZOO, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_torch_and_onnx_give_the_same_numbers(name):
    ours, theirs = served(name), reference(name)
    assert (ours.classes, ours.shape) == (theirs.classes, theirs.shape) == (CLASSES, KNOWN[name][1])
    assert ours.prompt_width == theirs.prompt_width
    assert (ours.prompt_width is not None) == (name in TRANSFORMERS)
    assert ours.has_batch_norm == theirs.has_batch_norm == (name in (*WITH_BATCH_NORM, *LARGE))
    np.testing.assert_array_equal(ours.head[0], theirs.head[0])
    np.testing.assert_array_equal(ours.head[1], theirs.head[1])
    shift = np.random.default_rng(2).normal(size=ours.head[0].shape[1]).astype(np.float32)
    prompts = [{}]
    if ours.prompt_width is not None:
        drawn = np.random.default_rng(4).normal(size=(3, ours.prompt_width)).astype(np.float32)
        prompts += [{"prompts": drawn}, {"prompts": drawn[:0]}, {"prompts": drawn[:1], "shift": shift}]

    def agree():
        for n, prior in ((1, None), (1, 16), (9, None), (9, 0), (9, 16)):
            x = examples(name, n, seed=n)
            for more in (*prompts, {"shift": shift}) if prior is None else prompts[:1]:
                close(ours(x, prior=prior, **more), theirs(x, prior=prior, **more))

    agree()
    affine = ours.affine()
    assert affine.keys() == theirs.affine().keys()
    assert all(np.array_equal(values, theirs.affine()[key]) for key, values in affine.items())
    if affine:
        before = ours(examples(name, 7))
        new = other_affine(ours)
        ours.load_affine(new)
        theirs.load_affine(new)
        agree()
        assert np.abs(ours(examples(name, 7)).logits - before.logits).max() > 1e-3
        ours.refold()
        agree()
        assert all(np.array_equal(values, new[key]) for key, values in ours.affine().items())


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_the_prior_is_what_it_says(name):
    """0 is the layer in training mode, infinity the layer in evaluation mode, n the midpoint of the statistics."""
    model, x = fresh(name), torch.from_numpy(examples(name, 6))
    predictor = TorchPredictor(model, CLASSES, KNOWN[name][1])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        still = model(x).numpy()
    np.testing.assert_allclose(predictor(x.numpy(), prior=1e9).logits, still, atol=1e-4)
    alone = predictor(x.numpy(), prior=0).logits
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.training
    model.train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.eval()
    with torch.no_grad():
        np.testing.assert_allclose(alone, model(x).numpy(), atol=1e-4)
    mode = predictor(x.numpy(), prior=0).logits  # a model in training mode is put back into it
    assert model.training
    np.testing.assert_array_equal(mode, alone)


def test_mixing_in_one_layer_is_the_formula():
    layer = torch.nn.BatchNorm2d(3)
    torch.nn.init.uniform_(layer.running_mean)
    torch.nn.init.uniform_(layer.running_var, 0.5, 2)
    x = torch.randn(5, 3, 4, 4)
    from trellis_clients.torch_predictor import mixing

    layer.eval()
    with torch.no_grad(), mixing([layer], 10, 5):
        got = layer(x)
    mean = (10 * layer.running_mean + 5 * x.mean((0, 2, 3))) / 15
    var = (10 * layer.running_var + 5 * x.var((0, 2, 3), correction=0)) / 15
    wanted = (x - mean[:, None, None]) / (var + layer.eps).sqrt()[:, None, None]
    torch.testing.assert_close(got, wanted)


def test_activations_end_in_the_features_and_prompts_matter():
    for name in TRANSFORMERS:
        predictor, x = reference(name), examples(name, 2)
        plain = predictor(x)
        np.testing.assert_allclose(plain.activations[:, -1], plain.features, atol=1e-6)
        with torch.no_grad():
            np.testing.assert_allclose(plain.logits, predictor.model(torch.from_numpy(x)).numpy(), atol=1e-5)
        width = predictor.prompt_width
        assert np.abs(predictor(x, prompts=np.ones((2, width))).features - plain.features).max() > 1e-3
        # The shift comes after the features and before the head.
        weight, bias = predictor.head
        shifted = predictor(x, shift=np.ones(width))
        np.testing.assert_allclose(shifted.features, plain.features, atol=1e-6)
        np.testing.assert_allclose(shifted.logits, (plain.features + 1) @ weight.T + bias, atol=1e-4)


@pytest.mark.parametrize("name", ["cnn-batch", "vit"])
def test_int8_is_near_and_serves_everything(name):
    ours, theirs = served(name, "int8"), reference(name)
    x = examples(name, 64, seed=1)
    for options in ({}, {"prior": 16}):
        a, b = ours(x, **options), theirs(x, **options)
        assert np.corrcoef(a.features.ravel(), b.features.ravel())[0, 1] > 0.98
        assert np.corrcoef(a.logits.ravel(), b.logits.ravel())[0, 1] > 0.98
    # The head is told in float, as it is used.
    assert np.abs(ours.head[0] - theirs.head[0]).max() <= np.abs(theirs.head[0]).max() / 100
    drawn = np.random.default_rng(0).normal(size=ours.head[0].shape[1]).astype(np.float32)
    if ours.prompt_width is not None:
        assert ours(x, prompts=drawn[None]).activations.shape == theirs(x, prompts=drawn[None]).activations.shape


def correlation(a, b):
    return np.corrcoef(a.features.ravel(), b.features.ravel())[0, 1]


@pytest.mark.parametrize("name", [*WITH_BATCH_NORM, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_int8_folds_every_batch_norm_behind_a_convolution(name):
    """What is left of an int8 graph is what static quantisation of a folded model gives: no norm, no ReLU."""
    ours, theirs, x = served(name, "int8"), reference(name), examples(name, 32, seed=1)
    folded = onnx.load_from_string(fold(ours._file, {}))
    onnx.checker.check_model(folded, full_check=True)
    kinds = [node.op_type for node in folded.graph.node]
    assert not {"BatchNormalization", "Clip", "If"} & set(kinds)
    assert [value.name for value in folded.graph.input] == ["x", "shift"]
    fast = ours(x)
    ours._fast = None
    adaptive = ours(x)
    # Random deep weights magnify rounding; that folding leaves out one rounding a layer must not make it worse.
    assert correlation(fast, theirs(x)) > min(0.97, correlation(adaptive, theirs(x)) - 0.02)
    assert not np.array_equal(fast.logits, adaptive.logits)  # they are two sessions


@pytest.mark.parametrize("name", ["cnn-batch", "four-conv", "resnet-batch"])
def test_int8_folds_negative_and_dead_channels(name):
    ours, theirs, x = served(name, "int8"), reference(name), examples(name, 32, seed=1)
    changed = ours.affine()
    first, second = [key for key in changed if key.endswith("weight")][:2]
    changed[first][0] *= -1
    changed[second][:2] = 0, 1e-12
    changed[second.replace("weight", "bias")][:2] = 0.5
    for predictor in (ours, theirs):
        predictor.load_affine(changed)
    assert ours._fast is None
    adaptive = ours(x)
    ours.refold()
    fast = ours(x)
    assert ours._fast is not None
    for got in (adaptive, fast):
        assert correlation(got, theirs(x)) > 0.97
    # Without the change the correlation is lower, so the figures above mean something.
    assert correlation(served(name, "int8")(x), theirs(x)) < correlation(fast, theirs(x)) - 0.01


def test_folding_is_exact_but_for_the_bias():
    """One convolution: the folded integers times their steps are a times the old ones, the bias within half a step."""
    ours = served("cnn-batch", "int8")
    before, after = onnx.load_from_string(ours._file.blob), onnx.load_from_string(fold(ours._file, {}))

    def weights(proto):
        held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        made = {node.output[0]: node for node in proto.graph.node}
        conv = next(node for node in proto.graph.node if node.op_type == "Conv")
        scaled = [
            held[made[name].input[0]].astype(np.float64) * held[made[name].input[1]].reshape(-1, 1, 1, 1)
            for name in conv.input[1:2]
        ]
        if len(conv.input) > 2:
            scaled.append(held[made[conv.input[2]].input[0]].astype(np.float64) * held[made[conv.input[2]].input[1]])
        return held, scaled, held[made[conv.input[0]].input[1]]

    held, (old,), x_step = weights(before)
    scale, shift, mean, var = (
        held[f"body.1.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    a = scale / np.sqrt(var + 1e-5)
    _, (new, bias), _ = weights(after)
    np.testing.assert_allclose(new, old * a.reshape(-1, 1, 1, 1), rtol=1e-6)
    steps = np.abs(new).reshape(len(a), -1).max(1) / 127 * x_step
    assert (np.abs(bias - (shift - mean * a)) <= 0.51 * steps).all()


def test_swapping_under_load_answers_wholly_old_or_wholly_new():
    predictor, x = served("cnn-batch"), examples("cnn-batch", 4)
    old, new = predictor.affine(), other_affine(predictor)
    other = served("cnn-batch")
    other.load_affine(new)
    allowed = [predictor(x).logits, other(x).logits]
    wrong, stop, count = [], threading.Event(), [0]

    def ask():
        while not stop.is_set():
            got = predictor(x).logits
            count[0] += 1
            if not any(np.allclose(got, one, atol=1e-5) for one in allowed):
                wrong.append(got)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(20):
        predictor.load_affine(old if number % 2 else new)
        if number % 5 == 0:
            predictor.refold()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert count[0] > 20


# -- bad arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [served, reference], ids=["onnx", "torch"])
@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"x": np.zeros((2, 1, 16, 15))}, "predict-shape"),
        ({"x": np.zeros((0, 1, 16, 16))}, "predict-shape"),
        ({"x": np.zeros((1, 16, 16))}, "predict-shape"),
        ({"x": np.full((1, 1, 16, 16), "a")}, "predict-shape"),
        ({"x": np.full((1, 1, 16, 16), np.nan)}, "predict-finite"),
        ({"x": np.full((1, 1, 16, 16), 1e300)}, "predict-finite"),
        ({"prior": -1}, "predict-prior"),
        ({"prior": float("nan")}, "predict-prior"),
        ({"prior": "16"}, "predict-prior"),
        ({"prompts": np.zeros((1, 31))}, "predict-prompts"),
        ({"prompts": np.zeros(32)}, "predict-prompts"),
        ({"shift": np.zeros(31)}, "predict-shift"),
        ({"shift": np.full(32, np.inf)}, "predict-finite"),
    ],
)
def test_a_bad_argument_is_named(make, options, code):
    with pytest.raises(TrellisError) as error:
        make("vit")(**{"x": np.zeros((1, 1, 16, 16)), **options})
    assert error.value.code == code


def test_a_model_without_prompts_says_so():
    with pytest.raises(TrellisError, match="takes no prompts"):
        served("mlp")(examples("mlp", 1), prompts=np.zeros((1, 64)))


@pytest.mark.parametrize("make", [served, reference], ids=["onnx", "torch"])
def test_bad_affine_parameters_are_refused_whole(make):
    predictor = make("vit")
    before = predictor.affine()
    for arrays, code in (
        ({"norm.wieght": np.ones(32)}, "affine-name"),
        ({"norm.weight": np.ones(31)}, "affine-shape"),
        ({"norm.weight": np.full(32, np.nan)}, "predict-finite"),
    ):
        with pytest.raises(TrellisError) as error:
            predictor.load_affine({"norm.bias": np.ones(32), **arrays})
        assert error.value.code == code
    assert all(np.array_equal(values, before[name]) for name, values in predictor.affine().items())
    assert "Did you mean 'norm.weight'?" in str(_error(predictor.load_affine, {"norm.wieght": np.ones(32)}))


def _error(work, *arguments):
    with pytest.raises(TrellisError) as error:
        work(*arguments)
    return error.value


# -- bad files ------------------------------------------------------------------------------------------


def changed(change):
    """Return a good file with something done to it."""
    proto = onnx.ModelProto.FromString(blob("cnn-batch"))
    change(proto)
    return proto.SerializeToString()


def metadata(key, text):
    def change(proto):
        next(entry for entry in proto.metadata_props if entry.key == key).value = text

    return change


def said(**more):
    """Return a change of the description."""

    def change(proto):
        entry = next(entry for entry in proto.metadata_props if entry.key == "trellis.model")
        entry.value = json.dumps({**json.loads(entry.value), **more})

    return change


def external(proto):
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def external_in_a_branch(proto):
    choice = next(node for node in proto.graph.node if node.op_type == "If")
    mixed = next(branch.g for branch in choice.attribute if branch.g.initializer)
    mixed.initializer[0].external_data.add(key="location", value="/etc/passwd")


def external_in_a_constant(proto):
    tensor = helper.make_tensor("t", onnx.TensorProto.FLOAT, [1], [0.0])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    proto.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def foreign_node(proto):
    proto.graph.node[0].domain = "com.evil"


def loop(proto):
    body = helper.make_graph([], "body", [], [])
    proto.graph.node.append(helper.make_node("Loop", ["", ""], [], body=body))


def sparse(proto):
    proto.graph.sparse_initializer.add()


def not_finite(proto):
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "head.weight")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0, 0] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def short_tensor(proto):
    tensor = proto.graph.initializer[0]
    tensor.raw_data = tensor.raw_data[:-4]


def cycle(proto):
    convolution = next(node for node in proto.graph.node if node.op_type == "Conv")
    convolution.input[0] = convolution.output[0]


def no_default(proto):
    proto.graph.input.append(helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1]))


def double_input(proto):
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (lambda: b"", "onnx-damaged"),
        (lambda: b"not an ONNX file at all", "onnx-damaged"),
        (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), "onnx-damaged"),
        (lambda: blob("cnn-batch")[:-1], "onnx-damaged"),
        (lambda: blob("cnn-batch")[: len(blob("cnn-batch")) // 2], "onnx-damaged"),
        (lambda: changed(lambda proto: proto.ClearField("graph")), "onnx-damaged"),
        (lambda: changed(lambda proto: proto.ClearField("metadata_props")), "onnx-metadata"),
        (lambda: changed(metadata("trellis.format", "2")), "onnx-format"),
        (lambda: changed(metadata("trellis.model", "{")), "onnx-metadata"),
        (lambda: changed(metadata("trellis.model", "[" * 100_000)), "onnx-metadata"),
        (lambda: changed(metadata("trellis.model", "[]")), "onnx-metadata"),
        (lambda: changed(said(classes=[])), "onnx-metadata"),
        (lambda: changed(said(classes=[1, 2, 3, 4])), "onnx-metadata"),
        (lambda: changed(said(shape=[1, -16, 16])), "onnx-metadata"),
        (lambda: changed(said(classes=["ant", "bee"])), "onnx-interface"),
        (lambda: changed(said(shape=[1, 8, 8])), "onnx-interface"),
        (lambda: changed(said(features=63)), "onnx-interface"),
        (lambda: changed(said(prompts=63)), "onnx-interface"),
        (lambda: changed(said(affine=["body.9.weight"])), "onnx-interface"),
        (lambda: changed(said(head={"weight": "nowhere", "bias": "head.bias"})), "onnx-interface"),
        (lambda: changed(no_default), "onnx-interface"),
        (lambda: changed(double_input), "onnx-interface"),
        (lambda: changed(external), "onnx-external"),
        (lambda: changed(external_in_a_branch), "onnx-external"),
        (lambda: changed(external_in_a_constant), "onnx-external"),
        (lambda: changed(foreign_node), "onnx-domain"),
        (lambda: changed(lambda proto: proto.opset_import.add(domain="com.evil", version=1)), "onnx-domain"),
        (lambda: changed(lambda proto: proto.functions.add()), "onnx-operator"),
        (lambda: changed(loop), "onnx-operator"),
        (lambda: changed(sparse), "onnx-operator"),
        (lambda: changed(not_finite), "onnx-finite"),
        (lambda: changed(short_tensor), "onnx-damaged"),
        (lambda: blob("cnn-batch").replace(b"trellis.format", b"trellis.form\xea\xea"), "onnx-damaged"),
        (lambda: changed(said(ranges={"batch_norm": [0, float("nan")]})), "onnx-metadata"),
        (lambda: changed(cycle), "onnx-load"),
    ],
)
def test_a_bad_file_is_refused(data, code):
    error = _error(OnnxPredictor, data())
    assert error.code == code
    assert len(str(error)) < 500


def test_limits_and_a_missing_file(tmp_path):
    size = len(blob("cnn-batch"))
    assert read(blob("cnn-batch"), Limits(bytes=size)).about.classes == CLASSES
    assert _error(read, blob("cnn-batch"), Limits(bytes=size - 1)).code == "onnx-size"
    path = tmp_path / "model.onnx"
    path.write_bytes(blob("cnn-batch"))
    assert _error(read, path, Limits(bytes=size - 1)).code == "onnx-size"
    assert _error(read, path, Limits(nodes=20)).code == "onnx-nodes"
    assert _error(OnnxPredictor, tmp_path / "nowhere.onnx").code == "onnx-missing"
    assert _error(OnnxPredictor, tmp_path).code == "onnx-missing"
    assert _error(OnnxPredictor, blob("mlp"), 0).code == "onnx-threads"
    assert OnnxPredictor(str(path)).classes == CLASSES


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_damage_escapes_the_session(data):
    """Bytes changed, put in or cut out: the file is served or refused, nothing else is raised."""
    good = bytearray(blob("cnn-batch", "int8"))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(good) - 1))
        kind = data.draw(st.sampled_from(("change", "cut", "insert")))
        if kind == "change":
            good[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del good[place : place + data.draw(st.integers(1, 40))]
        else:
            good[place:place] = data.draw(st.binary(min_size=1, max_size=6))
    try:
        predictor = OnnxPredictor(bytes(good))
        assert predictor(np.zeros((1, *predictor.shape))).logits.shape == (1, len(predictor.classes))
    except TrellisError as error:
        assert error.code.startswith("onnx-")


def test_the_session_needs_no_torch(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(blob("vit", "int8"))
    code = (
        "import sys\n"
        "for name in ('torch', 'flwr', 'onnx', 'ray', 'pydantic', 'yaml', 'google.protobuf.json_format'):\n"
        "    sys.modules[name] = None\n"
        "import numpy as np\n"
        "from trellis_clients.edge.session import OnnxPredictor\n"
        f"p = OnnxPredictor({str(path)!r})\n"
        "print(p(np.zeros((2, 1, 16, 16)), prompts=np.zeros((1, 32))).logits.shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "(2, 4)\n", done.stderr
    assert done.stderr == ""  # nor a word from ONNX Runtime
