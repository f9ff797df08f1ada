"""What an export writes, refuses to write, and leaves behind."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from exported import CLASSES, TRANSFORMERS, WITH_BATCH_NORM, ZOO, blob, examples, fresh, graph, reference
from torch import nn

from trellis.errors import DataError, PluginError, TrellisError
from trellis.models import adaptation
from trellis.models._base import Classifier
from trellis_clients.edge.model_file import read
from trellis_clients.edge.session import OnnxPredictor
from trellis_clients.export import models
from trellis_clients.export.graph import to_onnx
from trellis_clients.export.models import ExportError, export_model


def export(to, name="cnn-batch", **changes):
    """Export a model of the zoo. Unless the test brings a model, torch has traced it before, which takes a second."""
    options = {"classes": CLASSES, "shape": ZOO[name][1], "calibration": examples(name, 32), **changes}
    if "model" in options or models.to_onnx is not to_onnx:
        return export_model(options.pop("model", None) or fresh(name), to, **options)
    traced = onnx.ModelProto.FromString(graph(name).SerializeToString())
    with mock.patch.object(models, "to_onnx", return_value=traced):
        return export_model(fresh(name), to, **options)


def labelled(name="cnn-batch", n=64):
    """Return examples, labelled as torch's model labels them."""
    x = examples(name, n, seed=6)
    return x, reference(name)(x).logits.argmax(1)


# -- the file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_the_graph_keeps_every_norm_apart_and_open(name):
    """Every scale, shift and statistic is a graph input whose default is the model's own value."""
    model, proto = fresh(name), onnx.load_from_string(blob(name))
    onnx.checker.check_model(proto, full_check=True)
    assert (proto.ir_version, [(d.domain, d.version) for d in proto.opset_import]) == (10, [("", 20)])
    inputs = {value.name for value in proto.graph.input}
    defaults = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    named = {**adaptation.affine(model), **adaptation.statistics(model)}
    mixing = {"prior"} if name in WITH_BATCH_NORM else set()
    prompts = {"prompts"} if name in TRANSFORMERS else set()
    assert inputs == {"x", "shift", *named, *mixing, *prompts}
    assert "x" not in defaults
    for key, tensor in named.items():
        np.testing.assert_array_equal(defaults[key], tensor.detach().numpy())
    sizes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input}
    assert sizes["x"] == ["n", *ZOO[name][1]]
    if prompts:
        assert sizes["prompts"] == ["P", model.head.in_features]
        assert defaults["prompts"].shape == (0, model.head.in_features)
    norms = [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    assert len(norms) == sum(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())


@pytest.mark.parametrize("name", ["cnn-batch", "vit"])
def test_int8_is_qdq_and_leaves_norms_in_float(name):
    proto = onnx.load_from_string(blob(name, "int8"))
    onnx.checker.check_model(proto, full_check=True)
    made = {node.output[0]: node for node in proto.graph.node}
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    fed = {input for node in proto.graph.node if "Normalization" in node.op_type for input in node.input[1:]}
    weights = 0
    for node in proto.graph.node:
        if node.op_type == "MatMul" and made[node.input[1]].op_type != "DequantizeLinear":
            assert made[node.input[0]].op_type != "DequantizeLinear"  # attention stays in float
        elif node.op_type in ("Conv", "Gemm", "MatMul"):
            weight = made[node.input[1]]
            assert weight.op_type == "DequantizeLinear"
            integers, steps, zero = (stored[input] for input in weight.input)
            assert integers.data_type == zero.data_type == onnx.TensorProto.INT8
            assert not onnx.numpy_helper.to_array(zero).any()
            assert len(onnx.numpy_helper.to_array(steps)) in integers.dims  # a step a channel
            assert stored[made[node.input[0]].input[2]].data_type == onnx.TensorProto.UINT8
            weights += 1
    assert weights == {"cnn-batch": 4, "vit": 1 + 4 * 4 + 1}[name]
    for key in fed & stored.keys():
        assert stored[key].data_type == onnx.TensorProto.FLOAT
    assert len(blob(name, "int8")) < 0.6 * len(blob(name))


def test_what_the_file_says_of_itself(tmp_path):
    report = export(
        tmp_path / "m.onnx",
        test=labelled(),
        preprocessing={"mean": [0.5], "std": [0.25]},
        source={"run": "digits/1", "seed": 3},
    )
    proto = onnx.load(tmp_path / "m.onnx")
    told = {entry.key: entry.value for entry in proto.metadata_props}
    assert told["trellis.format"] == "1"
    assert json.loads(told["trellis.source"]) == {"run": "digits/1", "seed": 3}
    preprocessing = {"shape": [1, 16, 16], "dtype": "float32", "mean": [0.5], "std": [0.25]}
    assert json.loads(told["trellis.preprocessing"]) == preprocessing
    about = read(tmp_path / "m.onnx").about
    assert about.classes == CLASSES
    assert about.norms == {"body.1": "batch", "body.5": "batch"}
    assert about.can == ("shift", "affine", "mixing")
    assert about.quantization == "int8"
    assert about.quality["agreement"] == report.agreement > 0.9
    assert about.quality["calibration"] == 32
    served = OnnxPredictor(tmp_path / "m.onnx")
    assert (served.preprocessing.mean, served.preprocessing.std) == ((0.5,), (0.25,))
    assert report.bytes == (tmp_path / "m.onnx").stat().st_size
    assert any("agreement" in line for line in report.lines())


@pytest.mark.parametrize("name", ["cnn-batch", "vit"])
def test_the_file_says_which_weights_it_was_made_from_in_int8_too(name):
    model = fresh(name)
    held = adaptation.weights_digest(model)
    assert len(held) == 64
    assert {read(blob(name, precision)).about.weights for precision in ("none", "int8")} == {held}
    other = fresh(name)
    other.load_state_dict({key: values.clone() for key, values in model.state_dict().items()})
    assert adaptation.weights_digest(other.double()) != held  # of another type
    assert adaptation.weights_digest(other.float()) == held
    for key, values in other.state_dict().items():  # every weight and statistic counts, and a counter does not
        before = values.clone()
        values.view(-1)[:1] += 1
        assert (adaptation.weights_digest(other) != held) == values.is_floating_point(), key
        values.copy_(before)
    assert adaptation.weights_digest(other) == held


def test_a_digest_stays_what_it_is():
    """Two arrays by hand: files that are out there must be known by later versions."""
    import hashlib
    import struct

    layer = nn.Linear(2, 1)
    layer.load_state_dict({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([0.5])})
    told = b"bias\0torch.float32\0(1,)\0" + struct.pack("<f", 0.5)
    told += b"weight\0torch.float32\0(1, 2)\0" + struct.pack("<ff", 1, 2)
    assert adaptation.weights_digest(layer) == hashlib.sha256(told).hexdigest()


def test_a_file_without_a_digest_is_read_and_one_that_is_no_text_is_not():
    proto = onnx.ModelProto.FromString(blob("mlp"))
    (entry,) = (each for each in proto.metadata_props if each.key == "trellis.model")
    said = json.loads(entry.value)
    del said["weights"]
    entry.value = json.dumps(said)
    assert read(proto.SerializeToString()).about.weights is None
    entry.value = json.dumps(said | {"weights": 3})
    with pytest.raises(DataError, match="damaged"):
        read(proto.SerializeToString())


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        export(tmp_path / name, "mlp", model=fresh("mlp"))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_model_in_training_mode_is_left_in_it(tmp_path):
    model = fresh("mlp").train()
    export(tmp_path / "m.onnx", "mlp", model=model)
    assert all(module.training for module in model.modules())


# -- what is refused ------------------------------------------------------------------------------------


def refused(folder, kind, code, *arguments, **options):
    with pytest.raises(kind) as error:
        export(folder / "m.onnx", *arguments, **options)
    assert error.value.code == code, error.value
    assert list(folder.iterdir()) == []  # nothing of it is left behind
    return error.value


@pytest.mark.parametrize(
    "calibration",
    [
        np.zeros((4, 1, 8, 8), np.float32),
        np.zeros((0, 1, 16, 16), np.float32),
        np.zeros((1, 16, 16), np.float32),
        np.full((4, 1, 16, 16), np.nan, np.float32),
        np.full((4, 1, 16, 16), "a"),
    ],
)
def test_calibration_data_that_do_not_fit_are_refused(tmp_path, calibration):
    error = refused(tmp_path, DataError, "export-calibration", calibration=calibration)
    assert "calibration data" in str(error)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"precision": "int4"}, "export-option"),
        ({"max_drop": -1.0, "test": (np.zeros((1, 1, 16, 16)), np.zeros(1))}, "export-option"),
        ({"max_drop": float("nan"), "test": (np.zeros((1, 1, 16, 16)), np.zeros(1))}, "export-option"),
        ({"max_drop": 1.0}, "export-option"),
        ({"classes": ("a", "b")}, "export-classes"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path, options, code):
    refused(tmp_path, TrellisError, code, **options)


def test_a_file_that_cannot_be_written(tmp_path):
    for to in (tmp_path, tmp_path / "nowhere" / "m.onnx"):
        with pytest.raises(TrellisError, match="cannot be written"):
            export(to, "mlp")


def test_the_gate_refuses_a_drop_and_keeps_an_older_file(tmp_path):
    x, y = labelled()
    wrong = (x, (y + 1) % len(CLASSES))  # int8 cannot lose here, so the drop is 0 or below
    assert export(tmp_path / "m.onnx", test=wrong, max_drop=0).drop <= 0
    before = (tmp_path / "m.onnx").read_bytes()
    coarse = examples("cnn-batch", 2) * 1e-3  # ranges far too small: everything saturates
    with pytest.raises(ExportError, match=r"accuracy falls by .* points .* max-drop allows 1") as error:
        export(tmp_path / "m.onnx", calibration=coarse, test=(x, y), max_drop=1)
    assert (error.value.code, error.value.exit_status) == ("export-drop", 1)
    assert (tmp_path / "m.onnx").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert export(tmp_path / "m.onnx", calibration=coarse, test=(x, y)).drop > 1  # without a gate it is only told


def test_a_graph_that_is_not_what_torch_computes_is_refused(tmp_path, monkeypatch):
    def broken(model, shape):
        proto = to_onnx(model, shape)
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "head.bias")
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + 0.01, "head.bias"))
        return proto

    monkeypatch.setattr(models, "to_onnx", broken)
    error = refused(tmp_path, ExportError, "export-parity")
    assert "logits of a plain prediction differ" in str(error)


def test_models_that_cannot_be_exported(tmp_path):
    class Branching(Classifier):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(256, 4)

        def features(self, x):
            return x.flatten(1) if float(x.sum()) > 0 else -x.flatten(1)

    class Forgetful(Branching):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(256, track_running_stats=False)

        def features(self, x):
            return self.norm(x.flatten(1))

    refused(tmp_path, TrellisError, "export-torch", model=Branching())
    refused(tmp_path, TrellisError, "export-norm", model=Forgetful())
    refused(tmp_path, PluginError, "model-head", model=nn.Sequential(nn.Flatten(), nn.Linear(256, 4)))
    torch._dynamo.reset()


def test_a_folded_batch_norm_would_be_noticed():
    proto = onnx.ModelProto.FromString(graph("cnn-batch").SerializeToString())
    from trellis_clients.export.graph import _check_batch_norms

    _check_batch_norms(proto, fresh("cnn-batch"))
    norm = next(node for node in proto.graph.node if node.op_type == "BatchNormalization")
    proto.graph.node.remove(norm)
    with pytest.raises(TrellisError, match="one to one"):
        _check_batch_norms(proto, fresh("cnn-batch"))
