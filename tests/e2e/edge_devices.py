"""A small exported model, and devices that serve it: real processes, as an operator starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHAPE, CLASSES = (1, 8, 8), tuple("0123456789")
MEAN, STD = 0.3, 0.35
MODULE = ("-m", "trellis_clients.edge")


def small_cnn(seed: int = 0) -> Any:
    """An untrained network whose batch norms have statistics of their own."""
    import torch

    from trellis import seeding
    from trellis.models.zoo.small_cnn import SmallCnn

    with seeding.scoped(seed, "edge-export"):
        model = SmallCnn(SmallCnn.Config(width=8, hidden=32, norm="batch")).build(SHAPE, len(CLASSES), {})
        model.train()
        with torch.no_grad():
            for _ in range(20):
                model(torch.randn(64, *SHAPE))
    return model.eval()


def export(path: Path, model: Any, precision: str = "none") -> Path:
    """Write a network's ONNX file."""
    import numpy as np

    from trellis_clients.export.models import export_model

    calibration = np.random.default_rng(0).normal(size=(64, *SHAPE)).astype(np.float32)
    standard = {"mean": [MEAN], "std": [STD]}
    export_model(
        model, path, classes=CLASSES, shape=SHAPE, calibration=calibration, precision=precision, preprocessing=standard
    )
    return path


class Device:
    """A process that serves; ``where`` is its address."""

    def __init__(self, process: subprocess.Popen[str], line: dict[str, Any]) -> None:
        self.process, self.line = process, line
        self.where: str = line["address"]

    def resident(self) -> int:
        """Bytes of memory that are its own."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def device(model: Path, *options: str, start: Sequence[str] = (sys.executable, *MODULE)) -> Iterator[Device]:
    """Serve a model in a process of its own, on free ports."""
    command = [*start, "serve", str(model), "--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=model.parent)
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield Device(process, json.loads(line))
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()
