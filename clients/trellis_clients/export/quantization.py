"""Static int8 quantisation in QDQ form: convolutions and matrix products in int8, everything else in float.

Activations are unsigned and asymmetric, weights signed and symmetric per output channel (U8S8). That is the form whose
products x86 processors with VNNI add up in one instruction without overflow, for which ONNX Runtime has its fastest
convolutions, and it spends all 256 levels on what a ReLU lets through. Signed activations (S8S8) are turned into it by
ONNX Runtime on such processors anyway.

A convolution's result is quantised before the batch norm behind it, because only then it runs in int8; the norm itself
stays in float. Where the statistics are the source's the edge puts the two together (``trellis_clients.edge.folding``),
for which the ranges behind the norm are returned here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, create_calibrator, quantize_static

from trellis.errors import DataError
from trellis_clients.export.graph import quiet

KINDS = ["Conv", "MatMul", "Gemm"]
"""What is computed in int8."""

FREE = ["Relu", "Clip", "MaxPool"]
"""What is passed through in int8 where it stands directly behind one of these."""

BATCH = 32


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds calibration data in batches."""

    def __init__(self, x: NDArray[np.float32]) -> None:
        self._batches: Iterator[NDArray[np.float32]] = (x[i : i + BATCH] for i in range(0, len(x), BATCH))

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"x": batch}


def check_calibration(x: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return calibration data as float32.

    Raises:
        DataError: they are empty, of another shape or not finite.
    """
    x = np.asarray(x)
    if x.dtype.kind not in "fiub" or x.ndim != 1 + len(shape) or x.shape[1:] != tuple(shape) or not len(x):
        raise DataError(
            "export-calibration",
            f"calibration data are {x.dtype} of shape {x.shape}; expected numbers of shape"
            f" (N, {', '.join(map(str, shape))}) with N at least 1",
        )
    numbers: NDArray[np.float32] = x.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise DataError("export-calibration", "calibration data hold a value that is not a finite number")
    return numbers


def quantize(proto: onnx.ModelProto, x: NDArray[np.float32]) -> tuple[onnx.ModelProto, dict[str, tuple[float, float]]]:
    """Quantise an exported graph, before mixing is added to it.

    Returns:
        The quantised graph, and the least and the greatest value of every batch norm's result over ``x``.
    """
    with tempfile.TemporaryDirectory(prefix="trellis-export-") as folder, quiet():
        plain, target = Path(folder, "plain.onnx"), Path(folder, "int8.onnx")
        constants = onnx.ModelProto.FromString(proto.SerializeToString())
        del constants.graph.input[1:]  # all but x: for the length of this they are constants
        onnx.save(constants, plain)
        ranges = _ranges(plain, Path(folder, "ranges.onnx"), proto, x)
        quantize_static(
            plain,
            target,
            Reader(x),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*KINDS, *FREE],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_attention(proto),
            # Products of matrices may leave in float, which saves a rounding before the residual sum.
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
        quantized = onnx.load(target)
    quantized.producer_name, quantized.producer_version = proto.producer_name, proto.producer_version
    del quantized.graph.value_info[:], quantized.metadata_props[:], quantized.graph.input[1:]
    quantized.graph.input.extend(proto.graph.input[1:])
    kept = [domain for domain in quantized.opset_import if domain.domain == ""]
    del quantized.opset_import[:]
    quantized.opset_import.extend(kept)
    return quantized, ranges


def _attention(proto: onnx.ModelProto) -> list[str]:
    """Return the products of activations with each other, by name: in int8 they cost accuracy and save little."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    return [node.name for node in proto.graph.node if node.op_type == "MatMul" and node.input[1] not in stored]


def _ranges(
    plain: Path, augmented: Path, proto: onnx.ModelProto, x: NDArray[np.float32]
) -> dict[str, tuple[float, float]]:
    results = [node.output[0] for node in proto.graph.node if node.op_type == "BatchNormalization"]
    if not results:
        return {}
    calibrator = create_calibrator(plain, ["BatchNormalization"], augmented_model_path=str(augmented))
    calibrator.collect_data(Reader(x))
    data = calibrator.compute_data()
    return {name: (float(np.min(data[name].lowest)), float(np.max(data[name].highest))) for name in results}
