"""Measure a device's process: memory, import time and time to the first prediction, without torch and with it.

    python benchmarks/edge_runtime.py [--repeats N] [--quick]

Every figure is of a fresh process, the kinds in turn, and ratios are of one turn. Times begin when the process is
started, so the interpreter's own start is in them. Writes benchmarks/results/edge_runtime.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).resolve().parent
SHAPE, CLASSES = (1, 8, 8), tuple("0123456789")
SPAWNED = "EDGE_BENCHMARK_SPAWNED"
MOST_RESIDENT, MOST_SECONDS = 150e6, 1.0

KINDS = {
    "edge-session": "ONNX Runtime session alone, as a library",
    "edge-server": "`python -m trellis_clients.edge serve`: gRPC, health, reflection, metrics; asked over a socket",
    "edge-server-int8": "the same with the model in int8",
    "edge-server-t3a": "in float32 with the adapter T3A",
    "trellis-edge": "the same through `trellis edge serve`, no adapter",
    "torch-model": "torch and the same model, as a library",
    "torch-client": "a training client: Flower's ClientApp, torch, the same model",
}
BASELINE = "torch-client"


# -- what runs in processes of its own --------------------------------------------------------------------


def network() -> Any:
    from trellis.models.zoo.small_cnn import SmallCnn

    return SmallCnn(SmallCnn.Config(width=16, hidden=64, norm="batch")).build(SHAPE, len(CLASSES), {}).eval()


def make(folder: Path) -> None:
    """Write the model, once for ONNX Runtime and once for torch."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from trellis_clients.export.models import export_model

    torch.manual_seed(0)
    model = network()
    examples = np.random.default_rng(0).normal(size=(64, *SHAPE)).astype(np.float32)
    for name, precision in (("model", "none"), ("int8", "int8")):
        path = folder / f"{name}.onnx"
        export_model(model, path, classes=CLASSES, shape=SHAPE, calibration=examples, precision=precision)
    save_file(model.state_dict(), folder / "model.safetensors")


def edge_session(folder: Path) -> dict[str, float]:
    started = time.perf_counter()
    import numpy as np

    from trellis_clients.edge.session import OnnxPredictor

    imported = time.perf_counter() - started
    logits = OnnxPredictor(folder / "model.onnx")(np.zeros((1, *SHAPE), np.float32)).logits
    assert logits.shape == (1, len(CLASSES))
    return itself(imported)


def torch_model(folder: Path) -> dict[str, float]:
    started = time.perf_counter()
    import torch
    from safetensors.torch import load_file

    model = network()
    imported = time.perf_counter() - started
    return itself(imported, torch_prediction(torch, load_file, model, folder))


def torch_client(folder: Path) -> dict[str, float]:
    started = time.perf_counter()
    import torch
    from safetensors.torch import load_file

    import trellis_clients.app
    from trellis import registry

    registry.load("trainers", "sgd")
    model = network()
    imported = time.perf_counter() - started
    assert trellis_clients.app
    return itself(imported, torch_prediction(torch, load_file, model, folder))


def torch_prediction(torch: Any, load_file: Any, model: Any, folder: Path) -> None:
    torch.set_num_threads(1)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.inference_mode():
        assert model(torch.zeros(1, *SHAPE)).shape == (1, len(CLASSES))


def itself(imported: float, _: None = None) -> dict[str, float]:
    """Return what a process found out, right after its first prediction."""
    seconds = time.monotonic() - float(os.environ[SPAWNED])
    return {"import_seconds": imported, "first_prediction_seconds": seconds, **memory(os.getpid())}


# -- what measures ----------------------------------------------------------------------------------------


def memory(process: int) -> dict[str, float]:
    """Return resident bytes now, and at their highest."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {
        "resident_bytes": int(fields["VmRSS"].split()[0]) * 1024,
        "peak_resident_bytes": int(fields["VmHWM"].split()[0]) * 1024,
    }


def spawn(*command: str, **how: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, SPAWNED: repr(time.monotonic())}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **how)


def library(kind: str, folder: Path) -> dict[str, float]:
    """Measure a kind that is a function above."""
    process = spawn(sys.executable, __file__, "--child", kind, str(folder))
    out, _ = process.communicate(timeout=300)
    if process.returncode:
        raise SystemExit(f"{kind} failed")
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def server(start: list[str], options: list[str], model: Path) -> dict[str, float]:
    """Start a server, ask it once, and look at it from outside."""
    import grpc

    from trellis_clients.edge.generated import open_inference_pb2 as oip

    request = oip.ModelInferRequest(model_name=model.stem, raw_input_contents=[bytes(4 * 64)])
    request.inputs.add(name="x", datatype="FP32", shape=[1, *SHAPE])
    began = time.monotonic()
    process = spawn(
        *start, "serve", str(model), "--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0",
        *options, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = json.loads(process.stdout.readline())
        with grpc.insecure_channel(line["address"]) as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            infer(request.SerializeToString(), timeout=30)
            seconds = time.monotonic() - began
        return {"first_prediction_seconds": seconds, **memory(process.pid)}
    finally:
        process.terminate()
        process.communicate(timeout=30)


def measure(kind: str, folder: Path) -> dict[str, float]:
    model = folder / ("int8.onnx" if kind.endswith("int8") else "model.onnx")
    if kind == "trellis-edge":
        return server([str(Path(sys.executable).parent / "trellis"), "edge"], [], model)
    if kind.startswith("edge-server"):
        options = ["--adapter", "t3a"] if kind.endswith("t3a") else []
        return server([sys.executable, "-m", "trellis_clients.edge"], options, model)
    return library(kind, folder)


def summary(values: list[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "low": low, "high": high}


def main() -> None:
    """Measure every kind in turn, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two turns: shows that it runs, not for figures")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "edge_runtime.json")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        kind, folder = given.child
        found = globals()[kind.replace("-", "_")](Path(folder))
        sys.stdout.write(json.dumps(found or {}) + "\n")
        return
    turns = []
    with tempfile.TemporaryDirectory(prefix="trellis-edge-") as name:
        folder = Path(name)
        library("make", folder)
        for kind in KINDS:  # files come into the page cache
            measure(kind, folder)
        for _ in range(2 if given.quick else given.repeats):
            turns.append({kind: measure(kind, folder) for kind in KINDS})
    write(turns, given.out)


def write(turns: list[dict[str, dict[str, float]]], out: Path) -> None:
    """Print and write medians with quartiles, and ratios to the training client of the same turn."""
    rows = {}
    for kind, words in KINDS.items():
        rows[kind] = {"what": words, **{key: summary([t[kind][key] for t in turns]) for key in turns[0][kind]}}
        rows[kind]["ratio_to_" + BASELINE] = {
            key: summary([t[BASELINE][key] / t[kind][key] for t in turns]) for key in turns[0][kind]
        }
    checks = {}
    for kind in [each for each in KINDS if "edge" in each]:
        resident = rows[kind]["resident_bytes"]["median"] < MOST_RESIDENT
        seconds = rows[kind]["first_prediction_seconds"]["median"] < MOST_SECONDS
        checks[kind] = {"under 150 MB resident": resident, "under 1 s to the first prediction": seconds}
    from trellis.runs import environment

    result = {"turns": len(turns), "rows": rows, "expected": checks, "environment": environment()}
    result["environment"]["load"] = os.getloadavg()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'':18}{'resident':>12}{'peak':>10}{'import':>10}{'first answer':>14}   {BASELINE} / this: memory, time")
    for kind, row in rows.items():
        imported = f"{row['import_seconds']['median']:.2f} s" if "import_seconds" in row else ""
        ratio = row["ratio_to_" + BASELINE]
        print(
            f"{kind:18}{row['resident_bytes']['median'] / 1e6:9.1f} MB"
            f"{row['peak_resident_bytes']['median'] / 1e6:7.1f} MB"
            f"{imported:>10}{row['first_prediction_seconds']['median']:12.2f} s   "
            f"{ratio['resident_bytes']['median']:.2f}, {ratio['first_prediction_seconds']['median']:.2f}"
        )
    for kind, check in checks.items():
        print(f"{kind}: " + "; ".join(f"{words}: {'yes' if met else 'NO'}" for words, met in check.items()))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
