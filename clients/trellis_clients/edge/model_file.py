"""An ONNX model file from outside: what is looked at before ONNX Runtime sees a byte of it.

A file is refused if it is larger than the limit, is not ONNX, keeps tensors in other files, holds operators from
outside the default set, model-local functions, loops, sparse tensors, more nodes than the limit, or weights that are
not finite, or if it does not describe itself as an export of ours does. What a graph can make ONNX Runtime allocate
cannot be told from its text: a device that takes models from others bounds the process's memory as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from trellis.errors import DataError
from trellis_clients.edge.onnx_messages import Model
from trellis_clients.edge.predictor import Array

FORMAT = "1"
"""Of the metadata. A reader takes its own format only."""

KEY = "trellis."
"""What our keys in ``metadata_props`` begin with: format, model, preprocessing, source, quality."""

FORBIDDEN = frozenset({"Loop", "Scan", "SequenceMap"})
"""Operators that repeat a graph: how long they run cannot be told."""

EXTERNAL = 1  # TensorProto.DataLocation
DTYPES: Mapping[int, type[np.generic]] = {
    1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16, 11: np.float64
}  # fmt: skip
"""TensorProto.DataType of the tensors that are read here."""


@dataclass(frozen=True)
class Limits:
    """What a file may be at most."""

    bytes: int = 512 * 1024 * 1024
    nodes: int = 20_000


@dataclass(frozen=True)
class Description:
    """What a model file says of itself (``trellis.model``).

    Attributes:
        classes: in the order of the logits.
        shape: of one example.
        features: D, their width.
        prompts: width of a prompt token; None where none are taken.
        norms: kind of every normalisation layer by name: batch, layer or group.
        affine: names of the graph inputs that are scale and shift of a normalisation layer.
        statistics: names of those that are a batch norm's source mean and variance.
        head: initializers of the last layer: ``weight`` and, unless zero, ``bias``; each with a ``_scale`` in int8.
        can: what the model can be asked for beside a prediction: affine, mixing, shift, prompts, activations.
        quantization: none or int8.
        ranges: least and greatest value of batch norms' results over the calibration data, by value name.
        weights: SHA-256 of the weights it was made from, see ``trellis.models.adaptation.weights_digest``; the same in
            int8 and float32. None in files that were written before there was one.
        preprocessing, source, quality: as ``docs/edge-export.md`` has them; free for a reader to ignore.
    """

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    features: int
    prompts: int | None
    norms: Mapping[str, str]
    affine: tuple[str, ...]
    statistics: tuple[str, ...]
    head: Mapping[str, str]
    can: tuple[str, ...]
    quantization: str
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    weights: str | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFile:
    """A file that passed. ``message`` is the parsed ``ModelProto``; nobody changes it."""

    blob: bytes
    message: Any
    about: Description

    def tensor(self, name: str) -> NDArray[Any]:
        """Return an initializer's values."""
        return values(next(tensor for tensor in self.message.graph.initializer if tensor.name == name))

    def head(self) -> tuple[Array, Array]:
        """Return weight ``(classes, D)`` and bias ``(classes,)`` of the last layer, in float."""
        head = self.about.head
        weight = self.tensor(head["weight"])
        bias = self.tensor(head["bias"]) if "bias" in head else np.zeros(len(weight))
        if "weight_scale" in head:
            weight = weight.astype(np.float32) * self.tensor(head["weight_scale"]).reshape(-1, 1)
        if "bias_scale" in head:
            bias = bias.astype(np.float32) * self.tensor(head["bias_scale"])
        return weight.astype(np.float32), bias.astype(np.float32)


def read(source: Path | str | bytes, limits: Limits | None = None) -> ModelFile:
    """Read a model file, given by its path or its bytes.

    Raises:
        DataError: it is not there, or is refused for one of the module's reasons.
    """
    limits = limits or Limits()
    blob = source if isinstance(source, bytes) else _bytes_of(Path(source), limits)
    if len(blob) > limits.bytes:
        raise DataError("onnx-size", f"the model has {len(blob)} bytes; at most {limits.bytes} are read")
    try:
        message = Model.FromString(blob)
    except DecodeError as error:
        raise DataError("onnx-damaged", f"not readable as an ONNX model, or cut short: {error}") from None
    _check_structure(message, limits)
    about = _description(message)
    _check_interface(message, about)
    return ModelFile(blob, message, about)


def _bytes_of(path: Path, limits: Limits) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limits.bytes + 1)
    except OSError as error:
        raise DataError("onnx-missing", f"no model can be read from {path}: {error.strerror}") from None


# -- structure ------------------------------------------------------------------------------------------


def _check_structure(message: Any, limits: Limits) -> None:
    if not message.HasField("graph") or not message.graph.node or not message.opset_import:
        raise DataError("onnx-damaged", "not an ONNX model: it holds no graph")
    foreign = {domain.domain for domain in message.opset_import} - {"", "ai.onnx"}
    if foreign:
        raise DataError(
            "onnx-domain", f"the model needs operators of {sorted(foreign)[0][:80]!r}; only ONNX's own are run"
        )
    if message.functions or message.training_info:
        raise DataError("onnx-operator", "the model holds functions or training information; neither is run")
    count = 0
    for graph in graphs(message.graph):
        count += len(graph.node)
        if count > limits.nodes:
            raise DataError("onnx-nodes", f"the graph has more than {limits.nodes} nodes")
        if graph.sparse_initializer:
            raise DataError("onnx-operator", "the model holds sparse tensors")
        for tensor in graph.initializer:
            _check_tensor(tensor)
        for node in graph.node:
            _check_node(node)


def _check_node(node: Any) -> None:
    if node.domain not in ("", "ai.onnx"):
        raise DataError("onnx-domain", f"node {node.name[:80]!r} is an operator of {node.domain[:80]!r}")
    if node.op_type in FORBIDDEN:
        raise DataError("onnx-operator", f"node {node.name[:80]!r} is a {node.op_type}, which may run for ever")
    for attribute in node.attribute:
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise DataError("onnx-operator", f"node {node.name[:80]!r} holds a sparse tensor")
        for tensor in [attribute.t, *attribute.tensors] if attribute.HasField("t") else attribute.tensors:
            _check_tensor(tensor)


def _check_tensor(tensor: Any) -> None:
    name = tensor.name[:80]
    if tensor.data_location == EXTERNAL or tensor.external_data:
        raise DataError("onnx-external", f"tensor {name!r} lies in another file; a model has to be whole")
    if any(size < 0 for size in tensor.dims):
        raise DataError("onnx-damaged", f"tensor {name!r} has a negative size")
    if tensor.data_type in (1, 10, 11) and not np.isfinite(values(tensor)).all():
        raise DataError("onnx-finite", f"tensor {name!r} holds a value that is not a finite number")


def graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and all graphs inside its nodes."""
    waiting = [graph]
    while waiting:
        here = waiting.pop()
        yield here
        for node in here.node:
            for attribute in node.attribute:
                waiting.extend([attribute.g] if attribute.HasField("g") else [])
                waiting.extend(attribute.graphs)


def values(tensor: Any) -> NDArray[Any]:
    """Return a tensor's values.

    Raises:
        DataError: its type is not one that is read here, or its length is not what its shape says.
    """
    dtype = DTYPES.get(tensor.data_type)
    if dtype is None:
        raise DataError("onnx-damaged", f"tensor {tensor.name[:80]!r} is of type {tensor.data_type}, which is not read")
    if tensor.raw_data:
        raw = tensor.raw_data
        flat = (
            np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")) if len(raw) % np.dtype(dtype).itemsize == 0 else None
        )
    elif dtype is np.float16:
        flat = np.asarray(tensor.int32_data, np.uint16).view(np.float16)
    else:
        listed: Any = {np.float32: tensor.float_data, np.float64: tensor.double_data, np.int64: tensor.int64_data}
        flat = np.asarray(listed.get(dtype, tensor.int32_data), dtype)
    if flat is None or flat.size != math.prod(tensor.dims):
        raise DataError("onnx-damaged", f"tensor {tensor.name[:80]!r} does not hold what its shape says")
    return flat.reshape(tuple(tensor.dims))


# -- description ----------------------------------------------------------------------------------------


def _description(message: Any) -> Description:
    held = {entry.key.removeprefix(KEY): entry.value for entry in message.metadata_props if entry.key.startswith(KEY)}
    if "format" not in held or "model" not in held:
        raise DataError("onnx-metadata", "the model does not describe itself: it was not made by `trellis export`")
    if held["format"] != FORMAT:
        raise DataError(
            "onnx-format", f"the model's metadata are of format {held['format'][:20]!r}; this version reads {FORMAT!r}"
        )
    try:
        said = json.loads(held["model"])
        rest = {key: json.loads(held.get(key, "{}")) for key in ("preprocessing", "source", "quality")}
        described = Description(
            classes=tuple(map(_text, said["classes"])),
            shape=tuple(map(_size, said["shape"])),
            features=_size(said["features"]),
            prompts=None if said["prompts"] is None else _size(said["prompts"]),
            norms={_text(name): _text(kind) for name, kind in said["norms"].items()},
            affine=tuple(map(_text, said["affine"])),
            statistics=tuple(map(_text, said["statistics"])),
            head={_text(part): _text(name) for part, name in said["head"].items()},
            can=tuple(map(_text, said["can"])),
            quantization=_text(said["quantization"]),
            ranges={_text(name): (_finite(low), _finite(high)) for name, (low, high) in said["ranges"].items()},
            weights=_text(said["weights"]) if "weights" in said else None,
            **{key: dict(value) for key, value in rest.items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError("onnx-metadata", f"the model's metadata are damaged: {type(error).__name__}: {error}") from None
    if not described.classes or "weight" not in described.head:
        raise DataError("onnx-metadata", "the model's metadata name no classes or no last layer")
    return described


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r:.40}")
    return value


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r:.40}")
    return float(value)


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TypeError(f"expected a size of at least 1, got {value!r:.40}")
    return value


def _check_interface(message: Any, about: Description) -> None:
    """Compare what the file says with the graph it holds."""
    graph = message.graph
    inputs = {value.name: _sizes(value) for value in graph.input}
    outputs = {value.name: _sizes(value) for value in graph.output}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    scales = {f"{part}_scale" for part in ("weight", "bias")}
    classes, width = len(about.classes), about.features
    wanted = {"x": (None, *about.shape), "shift": (width,)}
    if about.prompts is not None:
        wanted["prompts"] = (None, about.prompts)
    problems = [
        *(f"input {name!r}" for name, shape in wanted.items() if inputs.get(name) != shape),
        *(f"input {name!r}" for name in (*about.affine, *about.statistics) if name not in inputs or name not in shapes),
        *(f"a default of input {name!r}" for name in inputs if name != "x" and name not in shapes),
        *(f"output {name!r}" for name in ("logits", "features") if name not in outputs),
        *(["output 'activations'"] if about.prompts is not None and "activations" not in outputs else []),
        *(["input 'prior'"] if about.statistics and inputs.get("prior") != () else []),
        *(f"initializer {name!r}" for name in about.head.values() if name not in shapes),
    ]
    if not problems:
        bias = about.head.get("bias")
        if shapes[about.head["weight"]] != (classes, width) or (bias and shapes[bias] != (classes,)):
            problems.append("the last layer's shape")
        for part in scales & about.head.keys():
            if math.prod(shapes[about.head[part]]) not in (1, classes):
                problems.append(f"the last layer's {part}")
    floats = [*graph.input, *graph.output]
    problems += [f"a float {value.name[:80]!r}" for value in floats if value.type.tensor_type.elem_type != 1]
    if problems:
        raise DataError("onnx-interface", f"the graph does not have what its metadata say: {problems[0]}")


def _sizes(value: Any) -> tuple[int | None, ...]:
    """Return a graph input's or output's shape, None for sizes that are dynamic."""
    return tuple(size.dim_value if size.HasField("dim_value") else None for size in value.type.tensor_type.shape.dim)
