"""Devices as an operator runs them: processes with real models, killed, swapped, and asked for nonsense."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton

from edge_devices import CLASSES, MEAN, MODULE, SHAPE, STD, device, export, small_cnn
from trellis import seeding
from trellis.models.zoo.vit import Vit
from trellis_clients.edge import adapters, loading, state
from trellis_clients.edge.agent import Agent
from trellis_clients.edge.generated import open_inference_pb2 as oip
from trellis_clients.edge.runtime import Runtime, Selection, Settings
from trellis_clients.edge.uploads import UploadBuffer
from trellis_server.cloud_adaptation import CloudAdaptation
from trellis_server.cloud_adaptation import Settings as CloudSettings
from trellis_server.distillation import Weights

INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Two exported models of one architecture."""
    folder = tmp_path_factory.mktemp("exports")
    return [export(folder / f"{seed}.onnx", small_cnn(seed)) for seed in (0, 1)]


@pytest.fixture
def model(models, tmp_path) -> Path:
    path = tmp_path / "cnn.onnx"
    path.write_bytes(models[0].read_bytes())
    return path


def images(n: int, seed: int = 0):
    return np.random.default_rng(seed).normal(size=(n, *SHAPE)).astype(np.float32)


def infer(client, x, datatype: str = "FP32"):
    tensor = triton.InferInput("x", list(x.shape), datatype)
    tensor.set_data_from_numpy(x)
    return client.infer("cnn", [tensor], client_timeout=20)


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def put(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


def test_a_device_answers_as_the_network_it_was_exported_from(model):
    x, pixels = images(16), np.random.default_rng(1).integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    with torch.no_grad():
        expected = small_cnn(0)(torch.from_numpy(x))
        of_pixels = small_cnn(0)((torch.from_numpy(pixels) / 255 - MEAN) / STD)
    with device(model) as here, triton.InferenceServerClient(here.where) as client:
        result = infer(client, x)
        np.testing.assert_allclose(result.as_numpy("logits"), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(result.as_numpy("probabilities"), expected.softmax(1), rtol=1e-4, atol=1e-5)
        assert [each.decode() for each in result.as_numpy("labels")] == [CLASSES[k] for k in expected.argmax(1)]
        np.testing.assert_allclose(infer(client, pixels, "UINT8").as_numpy("logits"), of_pixels, rtol=1e-4, atol=1e-4)
        about = client.get_model_metadata("cnn", as_json=True)
        assert about["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "1", "8", "8"]}]


def test_an_int8_device_adapts_as_the_same_file_does_here(tmp_path):
    """Batch norms that mix statistics, in a quantised graph, behind a socket."""
    path = export(tmp_path / "cnn.onnx", small_cnn(0), "int8")
    options = ("--adapter", "prediction-bn", "--set", "prior=4.0")
    here = Runtime(loading.load(path, "cnn"), Settings(adapter="prediction-bn", options={"prior": 4.0}))
    plain = Runtime(loading.load(path, "cnn"))
    with device(path, *options) as there, triton.InferenceServerClient(there.where) as client:
        for seed in range(3):
            x = images(16, seed) * 2 + 1
            found = infer(client, x).as_numpy("logits")
            np.testing.assert_array_equal(found, here.predict(x).logits)
            assert np.abs(found - plain.predict(x).logits).max() > 0.01


# -- nonsense ---------------------------------------------------------------------------------------------


def nonsense(rng: random.Random) -> bytes:
    """A request that is wrong in one of many ways."""
    message = oip.ModelInferRequest(model_name="cnn")
    tensor = message.inputs.add(name="x", datatype="FP32", shape=[4, *SHAPE])
    x = images(4, rng.randrange(1000))
    kind = rng.randrange(14)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 2000))
    if kind == 1:
        x.flat[rng.randrange(x.size)] = rng.choice([np.nan, np.inf, -np.inf, 1e20])
    elif kind == 2:
        tensor.name = rng.choice(["y", "", "x" * 5000])
    elif kind == 3:
        tensor.datatype = rng.choice(["BF16", "STRING", "fp32", "", "INT4"])
    elif kind == 4:
        tensor.shape[:] = [rng.choice([-1, 0, 3, 2**40, 2**62]) for _ in range(rng.randrange(7))]
    elif kind == 5:
        message.model_name = rng.choice(["", "dog", "c" * 9000])
    elif kind == 6:
        message.inputs.add(name="z")
    elif kind == 7:
        return b"\x2a\x00" * rng.randrange(100, 20_000)
    elif kind == 8:
        tensor.contents.fp32_contents.extend([1.0] * rng.randrange(1, 300))
    elif kind == 9:
        message.outputs.add(name="z" * rng.randrange(50))
    elif kind == 10:
        tensor.shape[0] = rng.choice([65, 10**6])
    elif kind == 11:
        message.model_version = str(rng.randrange(2, 10**9))
    message.raw_input_contents.append(x.tobytes()[: rng.randrange(x.nbytes) if kind == 12 else None])
    data = message.SerializeToString()
    return data[: rng.randrange(1, len(data) - 1)] if kind == 13 else data


def send(where: str, requests: list[bytes]) -> Iterator[str]:
    """Send requests with eight on their way at a time; give each one's status."""
    window = threading.Semaphore(8)
    with grpc.insecure_channel(where) as channel:
        call = channel.unary_unary(INFER)
        futures = []
        for data in requests:
            window.acquire()
            future = call.future(data, timeout=30)
            future.add_done_callback(lambda _: window.release())
            futures.append(future)
        yield from (future.code().name for future in futures)


def test_ten_thousand_bad_requests_leave_memory_flat_and_the_server_up(model):
    rng = random.Random(0)
    kinds = [nonsense(rng) for _ in range(2000)]
    with device(model) as here, triton.InferenceServerClient(here.where) as client:
        before = infer(client, images(8)).as_numpy("logits")
        Counter(send(here.where, kinds))  # pools of threads and memory come up to what they will be
        resident = here.resident()
        codes = Counter(code for _ in range(5) for code in send(here.where, kinds))
        grown = here.resident() / resident - 1
        assert sum(codes.values()) == 10_000
        assert set(codes) <= {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}, codes
        assert codes["INVALID_ARGUMENT"] > 5000
        assert abs(grown) < 0.05, f"resident memory changed by {grown:.1%}"
        np.testing.assert_array_equal(infer(client, images(8)).as_numpy("logits"), before)


@pytest.mark.parametrize("what", ["missing", "text", "cut", "no metadata", "folder"])
def test_a_file_that_is_no_model_is_one_line(tmp_path, models, what):
    import onnx

    path = tmp_path / "bad.onnx"
    if what == "text":
        path.write_text("hello")
    elif what == "cut":
        path.write_bytes(models[0].read_bytes()[:-500])
    elif what == "no metadata":
        proto = onnx.load(models[0])
        del proto.metadata_props[:]
        onnx.save(proto, path)
    elif what == "folder":
        path.mkdir()
    command = [sys.executable, *MODULE, "serve", str(path), "--address", "127.0.0.1:0", "--metrics-address", "off"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and done.stderr.endswith("]\n")


# -- restarts ---------------------------------------------------------------------------------------------

ADAPTIVE = ("--adapter", "t3a", "--uploads", "--e-max", "0.85", "--e-min", "0.5", "--save-seconds", "0.05")


def saved(folder: Path, examples: int) -> bool:
    try:
        return state.read(folder / "state.npz")[0]["selection"]["seen"] == examples
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_device_that_ends_goes_on_where_it_was(model, tmp_path, end):
    """To the same bits as one that never ended: adapter, thresholds, uploads on disk."""
    folder = tmp_path / "state"
    batches = [images(16, seed) for seed in range(6)]
    runtime = Runtime(
        loading.load(model, "cnn"),
        Settings(adapter="t3a", selection=Selection(0.85, 0.5)),
        UploadBuffer(10**4, 10**8),
    )
    expected = [runtime.predict(x).logits for x in batches]
    found = []
    for part in (batches[:4], batches[4:]):
        with (
            device(model, *ADAPTIVE, "--state", str(folder)) as here,
            triton.InferenceServerClient(here.where) as client,
        ):
            found += [infer(client, x).as_numpy("logits") for x in part]
            if end is signal.SIGKILL:
                until(partial(saved, folder, 16 * len(found)))
            os.kill(here.process.pid, end)
            assert here.process.wait(20) == (0 if end is signal.SIGTERM else -signal.SIGKILL)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    kept, waiting = UploadBuffer(10**4, 10**8, folder=folder / "uploads").take(10**4), runtime.uploads.take(10**4)
    assert 0 < len(kept) == len(waiting) < 96
    assert all(
        (a.image == b.image).all() and a.number == b.number for a, b in zip(kept[:20], waiting[:20], strict=True)
    )


def vit():
    with seeding.scoped(0, "vit"):
        return Vit(Vit.Config(patch=4, dim=16, depth=2, heads=2)).build(SHAPE, len(CLASSES), {}).eval()


@pytest.mark.parametrize("name", adapters.NAMES)
def test_every_adapter_goes_on_after_a_restart_and_survives_a_swap(tmp_path, models, name):
    path = export(tmp_path / "vit.onnx", vit()) if name == "foa" else models[0]
    settings = Settings(adapter=name, source=images(32, 99))
    batches = [images(8, seed) for seed in range(4)]

    def started(folder=None):
        return Runtime(loading.load(path, "cnn"), settings, folder=folder)

    whole, first = started(), started(tmp_path / "state")
    arrays = {key: values * 1.5 for key, values in whole.live.model.predictor.affine().items()}
    expected = [whole.predict(x).logits for x in batches[:2]]
    whole.swap_affine(arrays)
    expected += [whole.predict(x).logits for x in batches[2:]]
    found = [first.predict(x).logits for x in batches[:1]]
    assert first.save()
    second = started(tmp_path / "state")
    found.append(second.predict(batches[1]).logits)
    second.swap_affine(arrays)
    found.append(second.predict(batches[2]).logits)
    assert second.save()
    found.append(started(tmp_path / "state").predict(batches[3]).logits)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_edge_and_cloud_close_the_loop_without_torch_on_the_device(models):
    """CEMA: samples selected by the runtime adapt the cloud's copy; what comes back makes the two alike."""
    nats = 0.99 * np.log(len(CLASSES))
    conf = CloudSettings(
        e_max=nats, upload_batch=16, replay_batch=16, replay_size=200, replay_least=32, foundation_lr=0.01,
        edge_lr=0.05, momentum=0.9, weights=Weights(), temperature=1.0, distil=True, follow=False, max_grad_norm=1.0,
    )  # fmt: skip
    cloud = CloudAdaptation(lambda: small_cnn(1), small_cnn(0), conf, 0, torch.device("cpu"))
    uploaded = []

    def link(uploads):
        uploaded.extend(uploads)
        pixels = np.stack([each.image for each in uploads]).astype(np.float32) / 255
        cloud.adapt({0: torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD))})
        return {name: values.detach().numpy() for name, values in cloud.copy(0).affine.items()}

    runtime = Runtime(
        loading.load(models[0], "cnn"), Settings(selection=Selection(0.99, 0.1)), UploadBuffer(1000, 10**7)
    )
    agent, x, streamed = Agent(runtime, link, most=200), images(16, 77), 0
    before = runtime.predict(x).logits
    for seed in range(4):
        for part in range(4):
            runtime.predict(images(16, 10 * seed + part) * 0.7 + 0.5)
            streamed += 16
        assert agent.exchange()
    assert 0 < len(uploaded) <= streamed + 16
    assert runtime.live.affine_version == 4
    with torch.no_grad():
        copy = cloud.copy(0).model.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(runtime.predict(x).logits, copy, rtol=1e-3, atol=1e-3)
    assert np.abs(copy - before).max() > 0.05


def test_new_files_swap_in_while_a_device_serves(model, models, tmp_path):
    x = images(4)
    with device(model, "--watch", "0.05") as here, triton.InferenceServerClient(here.where) as client:

        def logits():
            result = infer(client, x)
            response = result.get_response()
            return (response.model_version, response.parameters["affine_version"].int64_param), result.as_numpy(
                "logits"
            )

        predictor = loading.load(model, "cnn").predictor
        version, before = logits()
        assert version == ("1", 0)
        arrays = {name: values * 1.25 + 0.1 for name, values in predictor.affine().items()}
        with (tmp_path / "arrays.npz").open("wb") as file:
            np.savez(file, **arrays)
        put(tmp_path / "cnn.affine.npz", (tmp_path / "arrays.npz").read_bytes())
        until(lambda: logits()[0] == ("1", 1))
        predictor.load_affine(arrays)
        np.testing.assert_allclose(logits()[1], predictor(x).logits, rtol=1e-4, atol=1e-4)
        assert np.abs(logits()[1] - before).max() > 0.01
        put(model, b"not a model")
        put(model, models[1].read_bytes())
        until(lambda: logits()[0] == ("2", 0))
        np.testing.assert_allclose(logits()[1], loading.load(model, "cnn").predictor(x).logits, rtol=1e-5, atol=1e-6)
        with urllib.request.urlopen(here.line["metrics"], timeout=10) as page:
            assert 'trellis_edge_swaps_total{outcome="taken",what="model"} 1.0' in page.read().decode()


def test_the_edge_imports_nothing_heavy():
    """With torch, Flower and their like made unimportable, every module of the edge still imports."""
    code = (
        "import sys, importlib, pkgutil, json\n"
        "heavy = ['torch', 'flwr', 'ray', 'sklearn', 'safetensors', 'pandas', 'scipy', 'onnx', 'PIL', 'matplotlib']\n"
        "sys.modules |= dict.fromkeys(heavy)\n"
        "import trellis_clients.edge as edge\n"
        "names = [m.name for m in pkgutil.walk_packages(edge.__path__, 'trellis_clients.edge.')]\n"
        "names = [n for n in names if not n.endswith(('__main__', 'foa', '_evolution'))]\n"  # what cma asks for
        "for name in names: importlib.import_module(name)\n"
        "light = [n for n in sys.modules if n.split('.')[0] == 'trellis' or n.startswith('cma')]\n"
        "print(json.dumps([names, sorted(light)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    names, light = json.loads(done.stdout)
    assert len(names) > 15
    assert light == ["trellis", "trellis.errors"]
