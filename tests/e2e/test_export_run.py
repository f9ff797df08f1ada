"""From a run to an ONNX file on the command line, and what is said where that cannot be."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from federations import run
from trellis import cli
from trellis.data.loading import load_data
from trellis_clients.edge.session import OnnxPredictor

SCENARIO = """\
name: digits
data: digits
clients: 3
model: {name: small-cnn, norm: batch, width: 8}
trainer: {name: sgd, lr: 0.2, batch_size: 32, local_epochs: 2}
rounds: {count: 3}
evaluation: {federated_every: 0}
probe: {every: 0, least: 0}
runtime: {grid: local}
seeds: [0, 1]
variants:
  plain: {}
  recalibrated: {trainer: {batch_norm: recalibrate}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    current, outcome = run(tmp_path_factory.mktemp("export"), text=SCENARIO)
    assert not outcome.failed, outcome.failed
    return current


def call(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["export", *map(str, words)], standalone_mode=True)
    if isinstance(result.exception, cli.TrellisError):
        return result.exception.exit_status, f"error: {result.exception}"
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_run_becomes_a_file_that_predicts_as_it_did(finished, tmp_path):
    to = tmp_path / "m.onnx"
    cell = ("--variant", "plain", "--seed", "1")
    status, text = call(finished.path, "--to", to, *cell, "--max-drop", "1", "--json")
    assert status == 0, text
    report = json.loads(text)
    assert report["quantization"] == "int8"
    assert report["float32_difference"] < 1e-4
    assert report["agreement"] > 0.97
    assert report["examples"] == 359
    summary = json.loads((finished.path / "cells" / "plain-seed1" / "summary.json").read_text())
    assert report["torch_accuracy"] == pytest.approx(summary["final"]["central"]["accuracy"], abs=1e-6)
    served = OnnxPredictor(to)
    source = served.about.source
    assert (source["scenario"], source["variant"], source["seed"]) == ("digits", "plain", 1)
    assert source["weights_sha256"] == summary["sha256"]
    assert source["run"] == f"digits/{finished.path.name}"
    assert str(finished.path.parent.parent) not in json.dumps(source)  # no folder of this machine
    data = load_data(finished.scenario, 1)
    x, y = data.test.batch(data.test.rows.new_tensor(range(len(data.test)))).x.numpy(), data.test.fields["y"].numpy()
    assert float((served(x).logits.argmax(1) == y).mean()) == pytest.approx(report["accuracy"])
    np.testing.assert_allclose(served.preprocessing.mean, data.facts["mean"])


def test_clients_that_recalibrate_give_statistics_of_the_calibration_data(finished, tmp_path):
    cell = ("--variant", "recalibrated", "--seed", "0", "--quantize", "none", "--calibration", "1438")
    status, text = call(finished.path, "--to", tmp_path / "m.onnx", *cell)
    assert status == 0, text
    assert "float32" in text
    served = OnnxPredictor(tmp_path / "m.onnx")
    assert served.about.quality["accuracy"] > 0.8
    mean = served.statistics()["body.1.running_mean"]
    assert np.abs(mean).max() > 1e-3  # not the zeros that the model began with


@pytest.mark.parametrize(
    ("words", "code", "status"),
    [
        (("--quantize", "int4"), "export-option", 2),
        (("--calibration", "0"), "export-option", 2),
        (("--max-drop", "101"), "export-option", 2),
        ((), "export-cell", 2),
        (("--variant", "plane", "--seed", "0"), "export-cell", 2),
        (("--variant", "plain", "--seed", "2"), "export-cell", 2),
    ],
)
def test_a_mistake_is_one_line(finished, tmp_path, words, code, status):
    got, text = call(finished.path, "--to", tmp_path / "m.onnx", *words)
    assert (got, len(text.splitlines())) == (status, 1)
    assert text.endswith(f"[{code}]")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_run_and_runs_without_a_whole_model(finished, tmp_path):
    status, text = call("nothing", "--to", tmp_path / "m.onnx", "--runs", tmp_path)
    assert (status, "[run-missing]" in text) == (2, True)
    copy = tmp_path / "copy"
    shutil.copytree(finished.path, copy)
    cell = copy / "cells" / "plain-seed0"
    words = (copy, "--to", tmp_path / "m.onnx", "--variant", "plain", "--seed", "0")
    blob = (cell / "model.safetensors").read_bytes()
    for damage, code in (
        (blob[:-4], "run-damaged"),
        (blob[:-4] + b"\0\0\0\0", "run-damaged"),  # whole, but not the run's
        (b"", "run-damaged"),
    ):
        (cell / "model.safetensors").write_bytes(damage)
        status, text = call(*words)
        assert (status, code in text) == (2, True), text
    (cell / "model.safetensors").unlink()
    status, text = call(*words)
    assert "trellis run --resume" in text
    assert text.endswith("[export-unfinished]")
    shutil.rmtree(cell)
    assert call(*words)[1].endswith("[export-unfinished]")
    assert not (tmp_path / "m.onnx").exists()


def test_a_run_whose_clients_keep_their_norms_has_no_whole_model(tmp_path):
    text = SCENARIO.replace("seeds: [0, 1]", "").replace("recalibrate}", "local}").replace("count: 3", "count: 1")
    current, outcome = run(tmp_path, text=text)
    assert not outcome.failed
    status, said = call(current.path, "--to", tmp_path / "m.onnx", "--variant", "recalibrated")
    assert (status, said.endswith("[export-local]")) == (2, True), said
    assert not (tmp_path / "m.onnx").exists()


def test_a_run_that_holds_only_what_was_adapted_is_refused(tmp_path):
    text = """\
name: devices
data: {name: digits, size: 16}
clients: 2
partition: {name: iid, test_fraction: 0.5}
model: {name: small-cnn, width: 4, norm: batch}
trainer: {name: tta-source, stream: {corruptions: [contrast], segment: 2, batch_size: 16}}
strategy: {name: cema, foundation: {name: small-cnn, width: 4, norm: batch}, batches: 1, distil: false}
rounds: {count: 1}
evaluation: {central_every: 0, federated_every: 0}
probe: {every: 0, least: 0}
runtime: {grid: local}
"""
    current, outcome = run(tmp_path, text=text)
    assert not outcome.failed, outcome.failed
    status, said = call(current.path, "--to", tmp_path / "m.onnx")
    assert (status, said.endswith("[export-partial]")) == (2, True), said
    assert not (tmp_path / "m.onnx").exists()
