"""Devices that joined a server, as processes that cannot import torch, and outside clients that ask them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from trellis import scenario
from trellis.data.loading import load_federation
from trellis.data.streams import Stream

HEAVY = ["torch", "flwr", "ray", "sklearn", "safetensors", "pandas", "scipy", "onnx", "onnxscript", "PIL", "matplotlib"]
START = (
    f"import sys; sys.modules |= dict.fromkeys({HEAVY})\n"  # None in sys.modules: importing it fails
    "from trellis.cli import main; main()"
)


class Member:
    """A device's process. ``line`` is what it said when it began to serve, ``last`` the last line of its output."""

    def __init__(self, port: int, client: int, state: Path, *options: str) -> None:
        command = [sys.executable, "-c", START, "join", f"127.0.0.1:{port}", "--edge", "--insecure", "--log-json"]
        command += ["--node", f"device-{client}", "--node-config", f"client={client}", "--state", str(state)]
        command += ["--metrics-address", "127.0.0.1:0"]
        command += [*options] if "--serve" in options else [*options, "--serve", "127.0.0.1:0"]
        self.client, self.line, self.last = client, {}, ""
        self.serving = threading.Event()
        self.log: list[str] = []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._readers = [threading.Thread(target=each, daemon=True) for each in (self._out, self._err)]
        for reader in self._readers:
            reader.start()

    def _out(self) -> None:
        for text in self.process.stdout:
            self.last = text.strip()
            if text.startswith("{"):
                self.line = json.loads(text)
                self.serving.set()

    def _err(self) -> None:
        self.log.extend(self.process.stderr)

    def where(self, seconds: float = 120) -> str:
        """Its address for inference, once it serves."""
        end = time.monotonic() + seconds
        while not self.serving.wait(0.1):
            assert self.process.poll() is None, "".join(self.log)
            assert time.monotonic() < end, "".join(self.log)
        return self.line["address"]

    def version(self) -> int:
        """How many times its parameters were replaced."""
        with urllib.request.urlopen(self.line["metrics"], timeout=10) as page:
            return int(re.search(r'affine_version="(\d+)"', page.read().decode())[1])

    def maps(self) -> str:
        """Files that are mapped into its memory."""
        return Path(f"/proc/{self.process.pid}/maps").read_text()

    def end(self, how: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        status = self.process.wait(30)
        for reader in self._readers:
            reader.join(10)
        return status


@contextmanager
def members() -> Iterator[list[Member]]:
    made: list[Member] = []
    try:
        yield made
    finally:
        for each in made:
            if each.process.poll() is None:
                each.process.kill()
            each.process.wait(10)


def stream(each: scenario.Scenario, client: int, seed: int = 0) -> Stream:
    """The corrupted stream that a simulated device of the scenario reads; here an outside client sends it."""
    federation = load_federation(each, seed)
    facts = federation.data.facts
    mean, std = (tuple(facts.get(key, (default,))) for key, default in (("mean", 0.0), ("std", 1.0)))
    _, config = scenario.config_of(each, "trainers")
    return Stream(config.stream, federation.client(client).test, mean, std, seed, client)


def batch(source: Stream, position: int) -> tuple[Any, Any]:
    """Pixels ``(n, channels, height, width)``, uint8, and labels."""
    x, y = source.batch(position)
    return (source.to_pixels(x).numpy() * 255).round().astype(np.uint8), y.numpy()


def ask(client: triton.InferenceServerClient, pixels: Any, name: str = "model") -> Any:
    """The classes that a device answers."""
    tensor = triton.InferInput("x", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels)
    return client.infer(name, [tensor], client_timeout=20).as_numpy("logits").argmax(1)


def trained(each: scenario.Scenario, folder: Path) -> Any:
    """A source model of the scenario: its weights in source.safetensors, exported in source.onnx."""
    import torch
    from safetensors.torch import save_file

    from trellis import seeding
    from trellis.models import pretraining
    from trellis_clients.export.models import export_model

    federation = load_federation(each, 0)
    data = federation.data
    cls, config = scenario.config_of(each, "models")
    with seeding.scoped(0, "source"):
        model = cls(config).build(data.example_shape, data.num_classes, data.facts)
    pretraining.train(model, data.train, epochs=4, lr=3e-3, batch_size=32, seed=0, name="source")
    save_file(model.state_dict(), folder / "source.safetensors")
    clean = data.train.batch(torch.arange(64)).x.numpy()
    export_model(
        model, folder / "source.onnx", classes=data.classes, shape=data.example_shape, calibration=clean,
        precision="none", preprocessing={"mean": [0.0], "std": [1.0]},
    )  # fmt: skip
    return model
