"""From a torch classifier to an ONNX graph whose normalisation layers are graph inputs with defaults.

The exporter is torch's current one (``torch.export`` underneath), run without its own optimiser, which would fold
batch norms into convolutions. The layers' parameters are declared as graph inputs first, so that nothing afterwards
may take them for constants.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trellis.errors import TrellisError
from trellis.models import adaptation
from trellis_clients.torch_predictor import Forward, evaluating

OPSET = 20
"""Of the default operator set; ONNX Runtime 1.20 and later know it."""

IR_VERSION = 10

PREFIX = "model."
"""Where ``Forward`` keeps the classifier; names in the file are those of the classifier's own state dict."""


def to_onnx(model: nn.Module, shape: Sequence[int]) -> onnx.ModelProto:
    """Export a classifier in float32, batch dynamic.

    Inputs: ``x`` ``(n, *shape)``; ``shift`` ``(D,)``, zeros by default; for transformers ``prompts`` ``(P, D)``, none
    by default; scale, shift and source statistics of every normalisation layer by state-dict name, with the model's
    own as defaults. Outputs: ``logits``, ``features`` and for transformers ``activations``.

    Raises:
        PluginError: the model has no features or no linear head.
        TrellisError: it holds something that ONNX cannot express, or a batch norm without source statistics.
    """
    forward = Forward(model)
    _check_norms(model)
    program = _exported(forward, shape)
    norms = [*adaptation.affine(model), *adaptation.statistics(model)]
    _declare_inputs(program.model, [PREFIX + name for name in norms])
    proto: onnx.ModelProto = program.model_proto
    proto.ir_version = min(proto.ir_version, IR_VERSION)
    proto.producer_name, proto.producer_version = "trellis", ""
    _tidy(proto)
    _set_default(proto, "shift", [model.head.in_features])  # type: ignore[union-attr, list-item]
    if forward.width is not None:
        _set_default(proto, "prompts", [0, forward.width])
    _check_batch_norms(proto, model)
    return proto


def _check_norms(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is None:
            raise TrellisError("export-norm", f"batch norm {name!r} keeps no statistics, so there are none to export")


def _exported(forward: Forward, shape: Sequence[int]) -> Any:
    device = next(forward.parameters()).device
    width = forward.model.head.in_features  # type: ignore[union-attr]
    dynamic = torch.export.Dim.DYNAMIC
    prompts = forward.width is not None
    # Sizes of 0 and 1 would be taken for constants.
    arguments = (
        torch.zeros(3, *shape, device=device),
        torch.zeros(2, forward.width or 0, device=device) if prompts else None,
        torch.zeros(width, device=device),  # type: ignore[arg-type]
    )
    with evaluating(forward), torch.no_grad(), quiet():
        try:
            return torch.onnx.export(
                forward,
                arguments,
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
                input_names=["x", *["prompts"] * prompts, "shift"],
                output_names=["logits", "features", *["activations"] * prompts],
                dynamic_shapes=({0: dynamic}, {0: dynamic} if prompts else None, None),
            )
        except Exception as error:  # whatever torch meets in a model that it cannot trace
            reason = str(error).strip().splitlines() or [""]
            raise TrellisError(
                "export-torch", f"torch cannot export {type(forward.model).__name__}: {reason[0][:300]}"
            ) from error


def _declare_inputs(model: Any, names: Sequence[str]) -> None:
    """Make initializers graph inputs as well, then simplify the graph around them."""
    from onnxscript import optimizer

    for name in names:
        if name not in model.graph.initializers:
            raise TrellisError("export-norm", f"{name.removeprefix(PREFIX)!r} did not survive the export")
        model.graph.inputs.append(model.graph.initializers[name])
    with quiet():
        optimizer.optimize(model)


def _tidy(proto: onnx.ModelProto) -> None:
    """Give values their state-dict names and dynamic sizes the names ``n`` and ``P``; drop the exporter's notes."""
    graph = proto.graph
    del graph.value_info[:], proto.metadata_props[:], graph.metadata_props[:]
    for value in [*graph.input, *graph.output, *graph.initializer]:
        value.name = value.name.removeprefix(PREFIX)
        value.doc_string = ""
        del value.metadata_props[:]
    # Where the features are the input itself the exporter renames the input.
    x = graph.input[0].name
    graph.input[0].name = "x"
    for node in graph.node:
        node.input[:] = ["x" if name == x else name for name in node.input]
    # It finds its own names for sizes. All outputs begin with the batch; nothing else is dynamic but prompts.
    for value in [*graph.input, *graph.output]:
        sizes = value.type.tensor_type.shape.dim
        if value.name in ("x", "prompts") or value in graph.output:
            sizes[0].dim_param = "P" if value.name == "prompts" else "n"
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{number}"
        node.doc_string = ""
        del node.metadata_props[:]
        node.input[:] = [name.removeprefix(PREFIX) for name in node.input]
    used = {domain.domain for domain in proto.opset_import} & {node.domain for node in graph.node}
    kept = [domain for domain in proto.opset_import if domain.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)


def _set_default(proto: onnx.ModelProto, name: str, shape: list[int]) -> None:
    """Give a float graph input zeros as its default."""
    import numpy as np

    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))


def _check_batch_norms(proto: onnx.ModelProto, model: nn.Module) -> None:
    """Make sure that every batch norm of the model is a node of its own, fed by its own parameters."""
    found = {node.input[3] for node in proto.graph.node if node.op_type == "BatchNormalization"}
    wanted = {name for name in adaptation.statistics(model) if name.endswith("running_mean")}
    if found != wanted:
        raise TrellisError(
            "export-norm", f"batch norms did not survive the export one to one: {sorted(found ^ wanted)[:3]}"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress notes and warnings about their own insides from the terminal."""
    loggers = [logging.getLogger(name) for name in ("", "onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
