"""The fast form of a model: batch norms with fixed statistics put into the convolutions before them.

A model file keeps its batch norms apart, because they have to be adaptive. As long as nothing is overridden, they are
constants, and with ``a = scale / sqrt(var + eps)``

    a * (conv(x) - mean) + shift  =  conv'(x),    weight' = a * weight,    bias' = shift - a * mean

In float32 ONNX Runtime does that by itself once it sees constants. With int8 weights it cannot; here it is done on the
quantised numbers. A convolution's weights have one step size per channel, so |a| goes into the step size and the sign
of a into the integers, which makes the product exact; only the bias is rounded (to int32). The quantisation between
convolution and norm goes, and so does a ReLU or ReLU6 behind: the quantisation that follows cuts off at the same place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trellis_clients.edge.model_file import ModelFile, graphs, values
from trellis_clients.edge.onnx_messages import Model, Node, Tensor
from trellis_clients.edge.predictor import Array

MIXING = "mixing/"
"""What the names of nodes begin with that choose between source and batch statistics."""

KEPT = ("x", "prompts", "shift")
"""Graph inputs of the fast form."""

LEVELS = 255  # of uint8
LARGEST_BIAS = 2.0**30


def fold(file: ModelFile, affine: Mapping[str, Array]) -> bytes:
    """Return the fast form of a model, with the given scales and shifts in place of those in the file.

    It takes ``x``, ``shift`` and ``prompts``, and always normalises by the source's statistics.
    """
    model = Model.FromString(file.blob)
    _unmix(model.graph)
    graph = _Graph(model.graph)
    for name, new in affine.items():
        graph.set(name, new)
    kept = [value for value in graph.message.input if value.name in KEPT]
    del graph.message.input[:]
    graph.message.input.extend(kept)
    if file.about.quantization == "int8":
        for norm in [node for node in graph.nodes if node.op_type == "BatchNormalization"]:
            _fold_norm(graph, norm, file.about.ranges)
    graph.write()
    blob: bytes = model.SerializeToString()
    return blob


class _Graph:
    """A graph under change: nodes in order, initializers and readers by value name."""

    def __init__(self, message: Any) -> None:
        self.message = message
        self.nodes: list[Any] = list(message.node)
        self.constants = {tensor.name: tensor for tensor in message.initializer}
        # What a graph inside a node reads is kept like an output: its reader is not among the nodes here.
        inner = (inner for inner in graphs(message) if inner is not message)
        self.outputs = {value.name for value in message.output}
        self.outputs |= {name for graph in inner for node in graph.node for name in node.input}
        self.maker: dict[str, Any] = {}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in node.output:
                self.maker[name] = node
            for name in dict.fromkeys(node.input):
                self.readers[name].append(node)

    def get(self, name: str) -> NDArray[Any] | None:
        """Return a constant's values, or None where the value is computed."""
        tensor = self.constants.get(name)
        return None if tensor is None else values(tensor)

    def set(self, name: str, array: NDArray[Any]) -> None:
        """Set or add a constant."""
        kinds = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6}
        tensor = Tensor(name=name, data_type=kinds[array.dtype.name], dims=array.shape)
        tensor.raw_data = np.ascontiguousarray(array).tobytes()
        self.constants[name] = tensor

    def add(self, kind: str, inputs: list[str], output: str, before: Any, **integers: int) -> Any:
        """Insert a node."""
        node = Node(op_type=kind, name=f"folded/{output}", input=inputs, output=[output])
        for name, number in integers.items():
            node.attribute.add(name=name, i=number, type=2)
        self.nodes.insert(next(i for i, other in enumerate(self.nodes) if other is before), node)
        self.maker[output] = node
        for name in dict.fromkeys(inputs):
            self.readers[name].append(node)
        return node

    def remove(self, *gone: Any) -> None:
        for node in gone:
            for name in dict.fromkeys(node.input):
                self.readers[name] = [other for other in self.readers[name] if other is not node]
        self.nodes = [node for node in self.nodes if not any(node is other for other in gone)]

    def redirect(self, old: str, new: str, *but: Any) -> None:
        """Let the readers of a value read another."""
        for node in self.readers[old]:
            if not any(node is other for other in but):
                node.input[:] = [new if name == old else name for name in node.input]
                self.readers[new].append(node)
        self.readers[old] = [node for node in self.readers[old] if any(node is other for other in but)]

    def made_by(self, name: str, kind: str) -> Any:
        """Return the node that makes a value if it is of a kind, else None."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type == kind else None

    def sole_reader(self, name: str) -> Any | None:
        """Return the one node that reads a value which is no output; None where there are more or fewer."""
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def write(self) -> None:
        used = {name for node in self.nodes for name in node.input} | self.outputs
        nodes = [Node.FromString(node.SerializeToString()) for node in self.nodes]
        constants = [t for name, t in self.constants.items() if name in used or name in KEPT]
        constants = [Tensor.FromString(tensor.SerializeToString()) for tensor in constants]
        del self.message.node[:], self.message.initializer[:]
        self.message.node.extend(nodes)
        self.message.initializer.extend(constants)


def _unmix(graph: Any) -> None:
    """Let every batch norm read the source's statistics themselves."""
    for node in graph.node:
        if node.op_type == "BatchNormalization" and node.input[3].startswith(MIXING):
            mean = node.input[3].removeprefix(MIXING).rpartition("/")[0]
            node.input[3], node.input[4] = mean, mean.removesuffix("running_mean") + "running_var"
    kept = [Node.FromString(node.SerializeToString()) for node in graph.node if not node.name.startswith(MIXING)]
    del graph.node[:]
    graph.node.extend(kept)


@dataclass(frozen=True)
class _Place:
    """A quantised convolution with a batch norm behind it: x -> DQ -> conv -> Q -> DQ -> norm [-> relu] -> ..."""

    conv: Any
    weight: Any
    quantize: Any
    dequantize: Any
    norm: Any
    relu: Any | None

    @property
    def result(self) -> str:
        """The value that comes out at the end."""
        name: str = (self.relu or self.norm).output[0]
        return name


def _fold_norm(graph: _Graph, norm: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    place = _match(graph, norm)
    if place is None or place.result in graph.outputs:
        return
    quantizer = next((n for n in graph.readers[place.result] if n.op_type == "QuantizeLinear"), None)
    step, zero = _levels(graph, place, quantizer, ranges)
    if step is None or not _cuts_alike(graph, place.relu, step, zero):
        return
    folded = _folded(graph, place)
    if folded is None:
        return
    integers, steps, bias, x_step = folded
    conv, name = place.conv, place.conv.output[0]
    for key, array in (("w", integers), ("s", steps), ("b", bias), ("z", np.zeros(len(steps), np.int32))):
        graph.set(f"{name}/{key}", array)
    graph.set(f"{name}/bs", (steps * x_step).astype(np.float32))
    graph.set(f"{name}/wz", np.zeros(len(steps), np.int8))
    weight = graph.add("DequantizeLinear", [f"{name}/{k}" for k in ("w", "s", "wz")], f"{name}/weight", conv, axis=0)
    shift = graph.add("DequantizeLinear", [f"{name}/{k}" for k in ("b", "bs", "z")], f"{name}/bias", conv, axis=0)
    conv.input[:] = [conv.input[0], weight.output[0], shift.output[0]]
    gone = [place.quantize, place.dequantize, norm, *([place.relu] if place.relu is not None else [])]
    result, after = place.result, next(i for i, node in enumerate(graph.nodes) if node is gone[-1])
    following = graph.nodes[after + 1]
    graph.remove(*gone)
    conv.output[0] = result
    graph.maker[result] = conv
    if quantizer is None:
        graph.set(f"{result}/step", np.asarray(step, np.float32))
        graph.set(f"{result}/zero", np.asarray(zero, np.uint8))
        levels = [f"{result}/step", f"{result}/zero"]
        quantizer = graph.add("QuantizeLinear", [result, *levels], f"{result}/quantized", following)
        graph.add("DequantizeLinear", [f"{result}/quantized", *levels], f"{result}/dequantized", following)
    float_again = next(n for n in graph.readers[quantizer.output[0]] if n.op_type == "DequantizeLinear")
    graph.redirect(result, float_again.output[0], quantizer)


def _match(graph: _Graph, norm: Any) -> _Place | None:
    dequantize = graph.made_by(norm.input[0], "DequantizeLinear")
    quantize = graph.made_by(dequantize.input[0], "QuantizeLinear") if dequantize else None
    conv: Any = graph.made_by(quantize.input[0], "Conv") if quantize else None
    weight = graph.made_by(conv.input[1], "DequantizeLinear") if conv else None
    if not weight or not graph.made_by(conv.input[0], "DequantizeLinear"):
        return None
    chain = [(conv, quantize), (quantize, dequantize), (dequantize, norm)]
    if any(graph.sole_reader(first.output[0]) is not second for first, second in chain):
        return None
    reader = graph.sole_reader(norm.output[0])
    relu = reader if reader is not None and reader.op_type in ("Relu", "Clip") else None
    return _Place(conv, weight, quantize, dequantize, norm, relu)


def _bounds(graph: _Graph, relu: Any | None) -> tuple[float, float]:
    if relu is None:
        return -np.inf, np.inf
    if relu.op_type == "Relu":
        return 0.0, np.inf
    bounds = [-np.inf, np.inf]
    for position, name in enumerate(list(relu.input[1:3])):
        constant = graph.get(name) if name else None
        if constant is not None:
            bounds[position] = float(constant)
        elif name:
            return np.nan, np.nan
    return bounds[0], bounds[1]


def _levels(
    graph: _Graph, place: _Place, quantizer: Any | None, ranges: Mapping[str, tuple[float, float]]
) -> tuple[float | None, int]:
    """Return step size and zero point of the result: as it is quantised further on, or from its range."""
    if quantizer is not None:
        step, zero = (graph.get(name) for name in quantizer.input[1:3])
        return (None, 0) if step is None or zero is None or step.size != 1 else (float(step), int(zero))
    if place.norm.output[0] not in ranges:
        return None, 0
    bounds = _bounds(graph, place.relu)
    low, high = (float(np.clip(end, *bounds)) for end in ranges[place.norm.output[0]])
    low, high = min(low, 0.0), max(high, 0.0)
    size = max((high - low) / LEVELS, 1e-8)
    return size, round(-low / size)


def _cuts_alike(graph: _Graph, relu: Any | None, step: float, zero: int) -> bool:
    """Whether the range of the quantised result lies within what the activation lets through."""
    if relu is None:
        return True
    low, high = _bounds(graph, relu)
    return bool(-zero * step >= low - step / 100 and (LEVELS - zero) * step <= high + step / 100)


def _folded(
    graph: _Graph, place: _Place
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32], float] | None:
    """Return weights, their step sizes, the bias in their units, and the step size of x."""
    integers, steps = (graph.get(name) for name in place.weight.input[:2])
    x_steps = graph.get(graph.maker[place.conv.input[0]].input[1])
    norm = [graph.get(name) for name in place.norm.input[1:5]]
    bias = _bias(graph, place.conv)
    if integers is None or steps is None or x_steps is None or bias is None or any(part is None for part in norm):
        return None
    scale, shift, mean, var = (np.asarray(part, np.float64) for part in norm)
    epsilon = next((a.f for a in place.norm.attribute if a.name == "epsilon"), 1e-5)
    a = scale / np.sqrt(var + epsilon)
    b = shift + (bias - mean) * a
    x_step = float(x_steps.reshape(()))
    new_steps = np.broadcast_to(steps.astype(np.float64), a.shape) * np.abs(a)
    # A channel that is all but switched off: its bias would not fit, and beside it its weights do not matter.
    dead = np.abs(b) >= LARGEST_BIAS * x_step * new_steps
    new_steps = np.where(dead, np.maximum(np.abs(b), 1e-12) / (x_step * 2.0**20), new_steps)
    sign = np.where(dead, 0, np.sign(a)).reshape(-1, *[1] * (integers.ndim - 1))
    # -128 has no opposite; symmetric quantisation does not produce it.
    turned = np.clip(integers.astype(np.int16) * sign, -127, 127).astype(np.int8)
    whole = np.rint(b / (x_step * new_steps)).astype(np.int32)
    return turned, new_steps.astype(np.float32), whole, x_step


def _bias(graph: _Graph, conv: Any) -> NDArray[np.float64] | float | None:
    if len(conv.input) < 3 or not conv.input[2]:
        return 0.0
    plain = graph.get(conv.input[2])
    if plain is not None:
        return plain.astype(np.float64)
    maker = graph.made_by(conv.input[2], "DequantizeLinear")
    if maker is None:
        return None
    integers, steps = (graph.get(name) for name in maker.input[:2])
    return None if integers is None or steps is None else integers.astype(np.float64) * steps
