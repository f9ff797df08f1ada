"""Latency, throughput and size of a model in torch, and exported to ONNX in float32 and int8, on one core.

Everything is measured in one process pinned to one core, with one thread in torch and in ONNX Runtime, and in turns:
one call of each, then again. Each figure is a median over calls, with quartiles; CPU time stands beside wall time
because other programs do not change it much. ONNX goes through ``OnnxPredictor`` with all its checks. Weights are
random: they do not matter for the time, and accuracy is not measured here.

    python benchmarks/onnx_latency.py [--quick] [--only small mobilenet]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from trellis import registry
from trellis_clients import batchnorm
from trellis_clients.edge.session import OnnxPredictor
from trellis_clients.export.models import export_model
from trellis_clients.torch_predictor import TorchPredictor

RESULTS = Path(__file__).parent / "results" / "onnx_latency.json"
PAGE = Path(__file__).parents[1] / "docs" / "edge-export.md"
BEGIN, END = "<!-- latency:begin -->", "<!-- latency:end -->"
WARM = 20
BATCHES = (1, 32)
WANTED = 2.0
"""How many times faster than torch int8 should be at batch 1 for a MobileNet-class model at 224x224."""

# name: (plug-in, parameters, shape, classes)
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int], int]] = {
    "small": ("small-cnn", {"norm": "batch"}, (1, 8, 8), 10),
    "mobilenet": ("timm", {"model": "mobilenetv2_100"}, (3, 224, 224), 1000),
}
TITLES = {"small": "small-cnn with batch norm, 1x8x8", "mobilenet": "MobileNetV2 (timm mobilenetv2_100), 3x224x224"}


def build(name: str) -> nn.Module:
    """Return a model with random weights whose batch norms have seen some data."""
    plugin, params, shape, classes = MODELS[name]
    cls = registry.load("models", plugin)
    torch.manual_seed(0)
    model: nn.Module = cls(cls.Config.model_validate(params)).build(shape, classes, {})
    batchnorm.recalibrate(model, [torch.randn(8, *shape)])
    return model.eval()


def measure(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Export a model both ways and time it and its exports at every batch size."""
    _, _, shape, classes = MODELS[name]
    model, names = build(name), tuple(map(str, range(classes)))
    calibration = np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32)
    files = {precision: folder / f"{name}-{precision}.onnx" for precision in ("none", "int8")}
    for precision, path in files.items():
        export_model(model, path, classes=names, shape=shape, calibration=calibration, precision=precision)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return {
        "model": TITLES[name],
        "bytes": {"torch": weights, "onnx float32": _size(files["none"]), "onnx int8": _size(files["int8"])},
        "batches": {
            str(size): _compare(model, TorchPredictor(model, names, shape), files, size, repeats) for size in BATCHES
        },
    }


def _size(path: Path) -> int:
    return path.stat().st_size


def _compare(
    model: nn.Module, adaptive: TorchPredictor, files: dict[str, Path], size: int, repeats: int
) -> dict[str, Any]:
    x = np.random.default_rng(1).normal(size=(size, *adaptive.shape)).astype(np.float32)
    tensor = torch.from_numpy(x)
    float32, int8 = OnnxPredictor(files["none"]), OnnxPredictor(files["int8"])

    def plain() -> Any:
        with torch.inference_mode():
            return model(tensor)

    calls: dict[str, Callable[[], Any]] = {
        "torch": plain,
        "onnx float32": lambda: float32(x),
        "onnx int8": lambda: int8(x),
        "torch, statistics mixed": lambda: adaptive(x, prior=16),
        "onnx float32, statistics mixed": lambda: float32(x, prior=16),
        "onnx int8, statistics mixed": lambda: int8(x, prior=16),
    }
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    warm = WARM if size == 1 else 2
    for turn in range(warm + (repeats if size == 1 else max(repeats // 8, 3))):
        for name, call in calls.items():
            before, before_cpu = time.perf_counter(), time.process_time()
            call()
            after_cpu, after = time.process_time(), time.perf_counter()
            if turn >= warm:
                wall[name].append(after - before)
                cpu[name].append(after_cpu - before_cpu)
    base = {"wall": median(wall["torch"]), "cpu": median(cpu["torch"])}
    return {
        name: {
            "ms": 1e3 * median(wall[name]),
            "ms_quartiles": [1e3 * q for q in quantiles(wall[name], n=4, method="inclusive")[::2]],
            "cpu_ms": 1e3 * median(cpu[name]),
            "per_second": size / median(wall[name]),
            "speed_over_torch": base["wall"] / median(wall[name]),
            "cpu_speed_over_torch": base["cpu"] / median(cpu[name]),
            "calls": len(wall[name]),
        }
        for name in calls
    }


def machine() -> dict[str, Any]:
    """Return what decides over int8: the processor's name and the instructions it has for it."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    lines = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    lines = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(lines.get("flags", "").split())
    kinds = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8")
    return {
        "processor": lines.get("model name", platform.processor()),
        "instructions": [flag for flag in kinds if flag in flags],
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def show(result: dict[str, Any]) -> None:
    for entry in result["models"].values():
        sizes = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in entry["bytes"].items())
        print(f"\n{entry['model']}: {sizes}")
        for size, rows in entry["batches"].items():
            print(f"  batch {size:>2}{'ms':>40}{'CPU ms':>10}{'per s':>10}{'x torch':>10}{'CPU x':>8}")
            for name, row in rows.items():
                print(
                    f"    {name:<34}{row['ms']:>10.3f}{row['cpu_ms']:>10.3f}{row['per_second']:>10.0f}"
                    f"{row['speed_over_torch']:>10.2f}{row['cpu_speed_over_torch']:>8.2f}"
                )


def write_table(result: dict[str, Any]) -> None:
    """Put the figures between the markers of the page."""
    machine = result["machine"]
    lines = [
        f"{machine['processor']} ({', '.join(machine['instructions'])}), torch {machine['torch']}, ONNX Runtime"
        f' {machine["onnxruntime"]}. Medians; "x torch" is the ratio of CPU times, that of wall times in brackets.',
        "",
        "| model | | MB | ms, batch 1 | x torch | images/s, batch 32 | x torch |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in result["models"].values():
        one, many = (entry["batches"][str(size)] for size in BATCHES)
        for name in one:
            size = entry["bytes"].get(name)
            cells = [
                entry["model"] if name == "torch" else "",
                name,
                "" if size is None else f"{size / 1e6:.2f}",
                f"{one[name]['ms']:.3g}",
                f"{one[name]['cpu_speed_over_torch']:.1f} ({one[name]['speed_over_torch']:.1f})",
                f"{many[name]['per_second']:,.0f}",
                f"{many[name]['cpu_speed_over_torch']:.1f} ({many[name]['speed_over_torch']:.1f})",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}" + rest.partition(END)[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few calls; nothing is written")
    parser.add_argument("--only", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(prefix="trellis-bench-") as folder:
        measured = {name: measure(name, Path(folder), 8 if options.quick else options.repeats) for name in options.only}
    result = {"machine": machine(), "threads": 1, "wanted": WANTED, "models": measured}
    show(result)
    if "mobilenet" in measured:
        reached = measured["mobilenet"]["batches"]["1"]["onnx int8"]["cpu_speed_over_torch"]
        result["held"] = reached >= WANTED
        print(f"\nint8 over torch at batch 1, CPU time: {reached:.2f} (wanted {WANTED:g})")
    if not options.quick:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        write_table(result)
    return 0 if result.get("held", True) else 1


if __name__ == "__main__":
    sys.exit(main())
