"""The forward-only adapters over ONNX Runtime: the predictions they give over torch, float32 to tolerance."""

from __future__ import annotations

import numpy as np
import pytest
from test_adapters import CLASSES, EVERY, SHAPE, batches, create

from trellis_clients.edge import adapters
from trellis_clients.edge.session import OnnxPredictor
from trellis_clients.export.models import export_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the exported file of a model of ``EVERY``, in float32 or int8, exported once."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def exported(make, precision: str):
        key = f"{make.__name__}-{precision}"
        if key not in made:
            made[key] = folder / f"{key}.onnx"
            calibration = np.concatenate(batches(4, 16, number=7))
            export_model(make(), made[key], classes=CLASSES, shape=SHAPE, calibration=calibration, precision=precision)
        return made[key]

    return exported


def served(files, case: str, precision: str = "none") -> adapters.Adapter:
    make, options = EVERY[case]
    adapter = adapters.create(case.split()[0], OnnxPredictor(files(make, precision)), **options)
    if adapter.needs_source:
        adapter.prepare(batches(1, 8, number=9)[0])
    return adapter


@pytest.mark.parametrize("case", EVERY)
@pytest.mark.parametrize("size", [1, 12])
def test_onnx_runtime_and_torch_give_the_same_predictions(files, case, size):
    onnx, torch = served(files, case), create(case)
    for x in batches(5, size):
        a, b = onnx.predict(x), torch.predict(x)
        scale = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * scale)
        clear = np.diff(np.sort(b, 1)[:, -2:], axis=1)[:, 0] > 1e-2 * scale
        assert (a.argmax(1) == b.argmax(1))[clear].all()


@pytest.mark.parametrize("case", EVERY)
def test_a_state_moves_between_torch_and_onnx_runtime(files, case):
    """A stream that began in torch goes on in ONNX Runtime."""
    torch, onnx, stream = create(case), served(files, case), batches(5)
    for x in stream[:3]:
        torch.predict(x)
    onnx.load_state(torch.state())
    for x in stream[3:]:
        np.testing.assert_allclose(onnx.predict(x), torch.predict(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", EVERY)
def test_an_interrupted_stream_over_an_int8_model_gives_the_same_bits(files, case):
    straight, first, stream = served(files, case, "int8"), served(files, case, "int8"), batches(5)
    expected = [straight.predict(x) for x in stream]
    got = [first.predict(x) for x in stream[:2]]
    second = served(files, case, "int8")
    second.load_state(first.state())
    got += [second.predict(x) for x in stream[2:]]
    for a, b in zip(expected, got, strict=True):
        assert np.array_equal(a, b)
    assert all(np.isfinite(answer).all() for answer in expected)
