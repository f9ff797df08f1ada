"""``pip install trellis[edge]`` into an empty environment: what comes along, and whether the runtime works there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton

from edge_devices import SHAPE, device, export, small_cnn

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "flwr", "ray", "scikit-learn", "onnx", "pandas", "scipy", "pillow", "safetensors", "tensorboard"}
OFFLINE = re.compile(r"from versions: none|NewConnectionError|Temporary failure in name|Network is unreachable", re.I)
LARGEST = 150e6

# One process does what a device does: start the server, answer one request over a socket, and look at itself.
LOOK = """
import time
started = time.perf_counter()
import json, os, resource, sys
import numpy as np
from trellis_clients.edge import command
server = command.build(command.parser().parse_args(
    ["serve", sys.argv[1], "--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", "--adapter", sys.argv[2]]))
server.start()
import grpc
from trellis_clients.edge.generated import open_inference_pb2 as oip
x = np.load(sys.argv[3])
request = oip.ModelInferRequest(model_name="cnn", raw_input_contents=[x.tobytes()])
request.inputs.add(name="x", datatype="FP32", shape=x.shape)
with grpc.insecure_channel(server.where) as channel:
    answer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(request.SerializeToString(), timeout=30)
seconds = time.perf_counter() - started
response = oip.ModelInferResponse.FromString(answer)
server.stop(1)
with open("/proc/self/statm") as file:
    resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
print(json.dumps({
    "logits": np.frombuffer(response.raw_output_contents[0], "<f4").tolist(),
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "resident": resident,
    "seconds": seconds,
}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Iterator[Path]:
    """An empty environment with ``trellis[edge]`` from this tree. Without an index: skipped, but not in CI."""
    folder = tmp_path_factory.mktemp("edge-environment")
    venv.create(folder, with_pip=True, symlinks=True)
    done = subprocess.run(
        [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--constraint", ROOT / "constraints.txt", f"{ROOT}[edge]"],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    if done.returncode and OFFLINE.search(done.stderr) and not os.environ.get("CI"):
        pytest.skip("no package index can be reached to make an environment from; runs in CI")
    assert done.returncode == 0, done.stderr
    yield folder
    shutil.rmtree(folder)  # 300 MB


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("export") / "cnn.onnx", small_cnn())


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)


def python(environment: Path, *arguments: object) -> str:
    command = [environment / "bin" / "python", *map(str, arguments)]
    # Nothing of the tree or of the tests' own environment may be found by accident.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=environment, env=clean)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_neither_torch_nor_flower_comes_along(environment):
    installed = {each["name"].lower() for each in json.loads(python(environment, "-m", "pip", "list", "--format=json"))}
    assert {"trellis", "onnxruntime", "grpcio", "cma"} <= installed
    assert not installed & HEAVY
    assert "No broken requirements" in python(environment, "-m", "pip", "check")


@pytest.mark.parametrize("adapter", ["none", "t3a"])
def test_a_request_is_answered_there_and_nothing_heavy_is_loaded(
    environment, model, x, tmp_path, record_property, adapter
):
    np.save(tmp_path / "x.npy", x)
    found = json.loads(python(environment, "-c", LOOK, model, adapter, tmp_path / "x.npy"))
    if adapter == "none":
        with torch.no_grad():
            expected = small_cnn()(torch.from_numpy(x))
        np.testing.assert_allclose(np.reshape(found["logits"], (3, -1)), expected, rtol=1e-4, atol=1e-4)
    assert not set(found["modules"]) & {*HEAVY, "sklearn", "PIL", "typer", "rich", "yaml", "cma", "matplotlib"}
    record_property("resident_megabytes", found["resident"] / 1e6)
    record_property("seconds_to_first_prediction", found["seconds"])
    assert found["resident"] < LARGEST


def test_the_command_is_there_and_every_adapter_loads(environment, model, x):
    named = python(
        environment, "-c", "from trellis_clients.edge import adapters as a; print([a.named(n).name for n in a.NAMES])"
    )
    assert "foa" in named and "t3a" in named
    for start in (
        [environment / "bin" / "trellis", "edge"],
        [environment / "bin" / "python", "-m", "trellis_clients.edge"],
    ):
        with device(model, start=list(map(str, start))) as here, triton.InferenceServerClient(here.where) as client:
            tensor = triton.InferInput("x", list(x.shape), "FP32")
            tensor.set_data_from_numpy(x)
            assert client.infer("cnn", [tensor]).as_numpy("labels").shape == (3,)


@pytest.mark.parametrize(
    ("command", "extras"),
    [("info trainer sgd", "train"), ("join localhost:1 --insecure", "train,deploy"), ("serve x.yaml", "train,deploy")],
)
def test_what_needs_torch_says_what_to_install(environment, command, extras):
    done = subprocess.run(
        [environment / "bin" / "trellis", *command.split()],
        capture_output=True, text=True, timeout=60, check=False, cwd=environment,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"pip install '.[{extras}]'" in done.stderr and len(done.stderr.splitlines()) == 1
