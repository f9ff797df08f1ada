"""Export a model in hand: graph, quantisation, comparison with torch, and the gate before the file is written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from trellis.errors import TrellisError, listed
from trellis_clients.edge.predictor import Array, Predictor
from trellis_clients.edge.session import OnnxPredictor
from trellis_clients.export.describe import describe
from trellis_clients.export.graph import to_onnx
from trellis_clients.export.mixing import add_mixing
from trellis_clients.export.quantization import check_calibration, quantize
from trellis_clients.torch_predictor import TorchPredictor

PRECISIONS = ("int8", "none")
TOLERANCE = 1e-4
"""How far float32 in ONNX Runtime may be from torch, in units of the largest value (at least 1)."""

BATCH = 32


class ExportError(TrellisError):
    """The model was exported, but is not good enough to be written."""

    exit_status = 1


@dataclass(frozen=True)
class Report:
    """What became of an export.

    Attributes:
        path: where the file is.
        bytes: its size.
        quantization: none or int8.
        float32_difference: largest difference between torch and the float32 graph, as a share of the largest value.
        calibration: examples the ranges of int8 were measured on.
        examples: those that accuracy and agreement were measured on; 0 where there were none.
        torch_accuracy: of the model in torch, in [0, 1]; None without labelled examples.
        accuracy: of the file in ONNX Runtime.
        drop: accuracy lost, in percentage points; below zero where the file is better.
        agreement: share of examples for which both name the same class.
    """

    path: str
    bytes: int
    quantization: str
    float32_difference: float
    calibration: int
    examples: int
    torch_accuracy: float | None = None
    accuracy: float | None = None
    drop: float | None = None
    agreement: float | None = None

    def lines(self) -> list[str]:
        """Return the report for a terminal."""
        lines = [
            f"{self.path}: {self.bytes / 1e6:.2f} MB, {'float32' if self.quantization == 'none' else 'int8'}",
            f"float32 against torch: largest difference {self.float32_difference:.1e} (allowed {TOLERANCE:.0e})",
        ]
        if self.accuracy is not None and self.torch_accuracy is not None:
            lines.append(
                f"accuracy on {self.examples} examples: {self.accuracy:.2%}, torch {self.torch_accuracy:.2%},"
                f" drop {self.drop:.2f} points, agreement {self.agreement:.2%}"
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_model(
    model: nn.Module,
    to: Path,
    *,
    classes: Sequence[str],
    shape: Sequence[int],
    calibration: NDArray[Any],
    precision: str = "int8",
    test: tuple[NDArray[Any], NDArray[Any]] | None = None,
    max_drop: float | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
) -> Report:
    """Write a classifier as an ONNX file for ``trellis_clients.edge.session.OnnxPredictor``.

    Args:
        model: with ``features(x)`` and a linear ``head``.
        to: the file; replaced if it is there, untouched if anything goes wrong.
        classes: in the order of the logits.
        shape: of one example.
        calibration: preprocessed examples ``(N, *shape)`` of the training data.
        precision: ``int8`` or ``none``.
        test: examples and labels that accuracy and agreement are measured on, none of them in ``calibration``.
        max_drop: most percentage points of accuracy that may be lost.
        preprocessing: mean, std and whatever a reader should know.
        source: where the model comes from.

    Raises:
        DataError: the calibration data do not fit the model.
        ExportError: float32 is not what torch computes, or accuracy falls by more than ``max_drop``.
        PluginError: the model has no features or no linear head.
        TrellisError: an option is wrong, or torch cannot export the model.
    """
    shape = tuple(shape)
    check_options(to, precision, max_drop)
    if max_drop is not None and test is None:
        raise TrellisError("export-option", "max-drop needs labelled examples to measure accuracy on; there are none")
    x = check_calibration(calibration, shape)
    reference = TorchPredictor(model, classes, shape)
    if reference.head[0].shape[0] != len(classes):
        raise TrellisError(
            "export-classes",
            f"the model has {reference.head[0].shape[0]} outputs, but there are {len(classes)} classes",
        )
    facts = {"preprocessing": {"shape": shape, "dtype": "float32", **(preprocessing or {})}, "source": source or {}}
    plain = to_onnx(model, shape)
    graph, ranges = plain, None
    difference = _parity(_finished(plain, model, classes, shape, None, facts), reference, x)
    if precision == "int8":
        graph, ranges = quantize(plain, x)
    served = OnnxPredictor(_finished(graph, model, classes, shape, ranges, facts))
    quality: dict[str, Any] = {"float32_difference": difference, "calibration": len(x), "examples": 0}
    quality |= _compare(reference, served, *test) if test else {}
    _gate(quality, max_drop)
    blob = _finished(graph, model, classes, shape, ranges, {**facts, "quality": quality})
    _write(to, blob)
    return Report(str(to), len(blob), precision, **quality)


def check_options(to: Path, precision: str, max_drop: float | None) -> None:
    """Check what can be checked before any work.

    Raises:
        TrellisError: an option is wrong.
    """
    if precision not in PRECISIONS:
        raise TrellisError("export-option", f"quantize={precision!r}; allowed are {listed(PRECISIONS)}")
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise TrellisError("export-option", f"max-drop={max_drop} is in percentage points, from 0 to 100")
    if not to.parent.is_dir() or to.is_dir():
        raise TrellisError("export-option", f"{to} cannot be written: its folder is not there, or it is one itself")


def _finished(
    graph: onnx.ModelProto,
    model: nn.Module,
    classes: Sequence[str],
    shape: Sequence[int],
    ranges: Mapping[str, tuple[float, float]] | None,
    facts: Mapping[str, Mapping[str, Any]],
) -> bytes:
    """Return a whole, checked file of a graph without mixing."""
    proto = onnx.ModelProto.FromString(graph.SerializeToString())
    add_mixing(proto)
    describe(proto, model, classes, shape, ranges, **facts)
    onnx.checker.check_model(proto, full_check=True)
    blob: bytes = proto.SerializeToString(deterministic=True)
    return blob


def _parity(blob: bytes, reference: Predictor, x: Array) -> float:
    """Compare float32 with torch in everything the file can do; return the largest difference.

    Raises:
        ExportError: it is above the tolerance.
    """
    served = OnnxPredictor(blob)
    generator = np.random.default_rng(0)
    drawn = generator.normal(size=(5, *x.shape[1:])).astype(np.float32) * max(float(x.std()), 1e-3) + x.mean()
    asked: list[dict[str, Any]] = [{}, {"shift": generator.normal(size=served.about.features)}]
    if served.has_batch_norm:
        # Not 0: dividing by a small batch's own variance magnifies rounding without bound.
        asked += [{"prior": 16}]
    if served.prompt_width is not None:
        asked += [{"prompts": generator.normal(size=(count, served.prompt_width))} for count in (0, 3)]
    worst = 0.0
    for batch in (x[:16], drawn, drawn[:1]):
        for options in asked:
            ours, theirs = served(batch, **options), reference(batch, **options)
            for name in ("logits", "features", "activations"):
                a, b = getattr(ours, name), getattr(theirs, name)
                if b is not None:
                    worst = max(worst, float(np.abs(a - b).max() / max(1.0, np.abs(b).max())))
                if not worst <= TOLERANCE:
                    raise ExportError(
                        "export-parity",
                        f"{name} of {', '.join(options) or 'a plain prediction'} differ from torch's by {worst:.1e};"
                        f" allowed is {TOLERANCE:.0e}",
                    )
    return worst


def _compare(reference: Predictor, served: Predictor, x: NDArray[Any], y: NDArray[Any]) -> dict[str, Any]:
    """Return accuracies of torch and of the file, the drop in points, and how often they agree."""
    theirs, ours = (
        np.concatenate([predictor(x[i : i + BATCH]).logits.argmax(1) for i in range(0, len(x), BATCH)])
        for predictor in (reference, served)
    )
    before, after = float((theirs == y).mean()), float((ours == y).mean())
    return {
        "examples": len(x),
        "torch_accuracy": before,
        "accuracy": after,
        "drop": 100 * (before - after),
        "agreement": float((ours == theirs).mean()),
    }


def _gate(quality: Mapping[str, Any], max_drop: float | None) -> None:
    if max_drop is not None and quality["drop"] > max_drop:
        raise ExportError(
            "export-drop",
            f"accuracy falls by {quality['drop']:.2f} points (from {quality['torch_accuracy']:.2%} to"
            f" {quality['accuracy']:.2%} on {quality['examples']} examples); max-drop allows {max_drop:g}."
            " Nothing was written. More --calibration examples may help",
        )


def _write(to: Path, blob: bytes) -> None:
    """Write a file so that under its name it is always whole."""
    descriptor, name = tempfile.mkstemp(prefix=f".{to.name}.", dir=to.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's own is for the owner alone
        os.replace(name, to)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
