"""Batch norms that mix source and batch statistics inside the graph, by one graph input for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PRIOR = "prior"
"""Scalar graph input: N, how many examples the source's statistics count for; below zero nothing is mixed."""

NAME = "mixing"
"""All nodes and values that are added here begin with it."""


def add_mixing(proto: onnx.ModelProto) -> None:
    """Let every BatchNormalization of a graph take ``(N * source + n * batch) / (N + n)`` as its statistics.

    The batch's mean and biased variance are computed in a branch (``If``) that runs only for ``prior >= 0``, so
    prediction by the source's statistics does not pay for them.
    """
    graph = proto.graph
    norms = [node for node in graph.node if node.op_type == "BatchNormalization"]
    if not norms:
        return
    graph.input.append(helper.make_tensor_value_info(PRIOR, TensorProto.FLOAT, []))
    graph.initializer.append(numpy_helper.from_array(np.asarray(-1, np.float32), PRIOR))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(_shared(graph))
    for node in nodes:
        if node.op_type == "BatchNormalization":
            graph.node.append(_choice(node))
            node.input[3], node.input[4] = graph.node[-1].output
        graph.node.append(node)


def _shared(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return what all layers need: whether to mix, and the weight of the source."""
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.asarray(0, np.float32), f"{NAME}/zero"),
            numpy_helper.from_array(np.asarray(0, np.int64), f"{NAME}/first"),
        ]
    )
    return [
        helper.make_node("GreaterOrEqual", [PRIOR, f"{NAME}/zero"], [f"{NAME}/on"], f"{NAME}/on"),
        helper.make_node("Shape", ["x"], [f"{NAME}/shape"], f"{NAME}/shape", start=0, end=1),
        helper.make_node("Gather", [f"{NAME}/shape", f"{NAME}/first"], [f"{NAME}/count"], f"{NAME}/count"),
        helper.make_node("Cast", [f"{NAME}/count"], [f"{NAME}/n"], f"{NAME}/n", to=TensorProto.FLOAT),
        helper.make_node("Add", [PRIOR, f"{NAME}/n"], [f"{NAME}/total"], f"{NAME}/total"),
        helper.make_node("Div", [PRIOR, f"{NAME}/total"], [f"{NAME}/source"], f"{NAME}/source"),
        helper.make_node("Div", [f"{NAME}/n", f"{NAME}/total"], [f"{NAME}/batch"], f"{NAME}/batch"),
    ]


def _choice(norm: onnx.NodeProto) -> onnx.NodeProto:
    """Return the node that gives a batch norm its mean and variance."""
    x, mean, var = norm.input[0], norm.input[3], norm.input[4]
    place = f"{NAME}/{mean}"

    def output(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(f"{place}/{name}", TensorProto.FLOAT, None)

    def node(kind: str, inputs: list[str], out: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [f"{place}/{out}"], f"{place}/{out}", **attributes)

    source = helper.make_graph(
        [node("Identity", [mean], "source_mean"), node("Identity", [var], "source_var")],
        f"{place}/source",
        [],
        [output("source_mean"), output("source_var")],
    )
    # Channels first and everything else in one row: works for (n, C), (n, C, H, W) and what lies between. The sum of
    # squared differences rather than E[x^2] - E[x]^2, which loses all digits where the mean is large.
    rows = helper.make_tensor(f"{place}/rows", TensorProto.INT64, [3], [0, 0, -1])
    axes = helper.make_tensor(f"{place}/axes", TensorProto.INT64, [2], [0, 2])
    mixed = helper.make_graph(
        [
            node("Reshape", [x, f"{place}/rows"], "flat"),
            node("ReduceMean", [f"{place}/flat", f"{place}/axes"], "mean", keepdims=1),
            node("Sub", [f"{place}/flat", f"{place}/mean"], "centred"),
            node("Mul", [f"{place}/centred", f"{place}/centred"], "squares"),
            node("ReduceMean", [f"{place}/squares", f"{place}/axes"], "batch_var", keepdims=0),
            node("Reshape", [f"{place}/mean", f"{place}/one"], "batch_mean"),
            node("Mul", [f"{place}/batch_mean", f"{NAME}/batch"], "mean_of_batch"),
            node("Mul", [mean, f"{NAME}/source"], "mean_of_source"),
            node("Add", [f"{place}/mean_of_batch", f"{place}/mean_of_source"], "mixed_mean"),
            node("Mul", [f"{place}/batch_var", f"{NAME}/batch"], "var_of_batch"),
            node("Mul", [var, f"{NAME}/source"], "var_of_source"),
            node("Add", [f"{place}/var_of_batch", f"{place}/var_of_source"], "mixed_var"),
        ],
        f"{place}/mixed",
        [],
        [output("mixed_mean"), output("mixed_var")],
        initializer=[rows, axes, helper.make_tensor(f"{place}/one", TensorProto.INT64, [1], [-1])],
    )
    outputs = [f"{place}/chosen_mean", f"{place}/chosen_var"]
    return helper.make_node("If", [f"{NAME}/on"], outputs, f"{place}/chosen", then_branch=mixed, else_branch=source)
