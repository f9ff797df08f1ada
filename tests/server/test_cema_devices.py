"""CEMA's strategy with devices that others ask: no labels, as many answers as there were, a model to send along."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from test_cema import SCENARIO, ask, attached, pixels, upload
from trellis import records, scenario
from trellis.errors import DataError
from trellis.models import adaptation
from trellis_clients.contract import site_of
from trellis_clients.edge.session import OnnxPredictor
from trellis_server import strategy_state
from trellis_server.strategies import build_strategy


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("cema") / "cema.yaml"
    path.write_text(SCENARIO)
    return site_of(path)


def unlabelled(to, images, **metrics):
    """A reply of a device: it does not know which of its answers were right."""
    reply = upload(to, images, **metrics)
    for name in ("right", "accuracy"):
        del reply.content["metrics"][name]
    return reply


def test_a_device_reports_as_many_as_it_was_asked(site):
    strategy, arrays = attached(site)
    message = ask(strategy, arrays)[0]
    for seen in (5, 32, 4000):
        assert strategy.problem_with(message, unlabelled(message, pixels(20), seen=seen)) is None
    for reply, reason in (
        (unlabelled(message, pixels(33)), "33 images; the stream had 32"),
        (unlabelled(message, pixels(5), uploaded=6), "do not agree"),
        (unlabelled(message, pixels(5), seen=-1), "not a count"),
        (upload(message, pixels(5), seen=40), "do not agree"),
    ):
        assert reason in strategy.problem_with(message, reply)


def test_figures_of_accuracy_are_those_of_labelled_streams_only(site):
    strategy, arrays = attached(site)
    _, some, simulated = ask(strategy, arrays)
    moved, line = strategy.aggregate_train(1, [unlabelled(some, pixels(), seen=100)])
    assert not {"accuracy", "round-accuracy", "right"} & set(line)
    assert (line["seen"], line["uploaded"], line["upload-share"]) == (100, 20, 0.2)
    assert records.digest(moved) != records.digest(arrays)
    replies = [unlabelled(some, pixels(seed=1), seen=100), upload(simulated, pixels(seed=2), right=24)]
    _, line = strategy.aggregate_train(2, replies)
    assert line["accuracy"] == line["round-accuracy"] == 24 / 32
    assert (line["seen"], line["right"]) == (132, 24)


def test_the_source_model_goes_along_exported_and_is_kept(site):
    strategy, arrays = attached(site, device_model="export")
    first = ask(strategy, arrays)
    blob = records.view(first[0].content["model"]["onnx"]).tobytes()
    predictor = OnnxPredictor(blob)
    assert set(predictor.affine()) == set(arrays) == set(first[0].content["arrays"])
    for name, values in predictor.affine().items():
        np.testing.assert_array_equal(values, records.view(arrays[name]))
    assert {message.content["config"]["source-sha256"] for message in first} == {predictor.about.weights}
    assert predictor.about.weights == adaptation.weights_digest(strategy.cloud.source)
    x = np.asarray(site.federation.data.test.fields["x"][:8])
    expected = strategy.cloud.source(site.federation.data.test.fields["x"][:8]).detach().numpy()
    np.testing.assert_allclose(predictor(x).logits, expected, rtol=1e-4, atol=1e-4)
    strategy.aggregate_train(1, [upload(m, pixels(seed=k)) for k, m in enumerate(first)])
    later = ask(strategy, arrays, 2)
    assert all("model" not in message.content for message in later)
    assert {message.content["config"]["source-sha256"] for message in later} == {predictor.about.weights}
    tensors, values = strategy_state.capture(strategy)
    raw = {
        **scenario.plain(site.scenario),
        "strategy": {**scenario.plain(site.scenario)["strategy"], "device_model": "export"},
    }
    restored = build_strategy(scenario.from_mapping(raw), 3, 0)
    strategy_state.restore(restored, tensors, values)
    restored.attach(SimpleNamespace(site=site))
    assert records.view(restored.device_model["onnx"]).tobytes() == blob


def test_a_files_model_goes_along_or_is_missed(site, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"bytes")
    strategy, arrays = attached(site, device_model=str(tmp_path / "model.onnx"))
    assert records.view(ask(strategy, arrays)[0].content["model"]["onnx"]).tobytes() == b"bytes"
    with pytest.raises(DataError, match=r"strategy\.device_model"):
        attached(site, device_model=str(Path(tmp_path) / "none.onnx"))
