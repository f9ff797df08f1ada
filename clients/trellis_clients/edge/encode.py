"""What an Open Inference Protocol request asks to be answered, and the answer's message."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trellis_clients.edge.decode import invalid, shown
from trellis_clients.edge.generated import open_inference_pb2 as oip

OUTPUTS = {"logits": "FP32", "probabilities": "FP32", "labels": "BYTES"}
"""What can be asked for, in the order of the answer: ``(n, classes)`` twice, and the most probable class's name."""


@dataclass(frozen=True)
class Wanted:
    """An output that a request asks for; ``top`` is the classification extension's number of classes."""

    name: str
    top: int | None = None


def wanted(request: oip.ModelInferRequest) -> list[Wanted]:
    """Return the outputs that a request asks for; all of them where it names none.

    Raises:
        RequestError: INVALID_ARGUMENT for a name that is unknown or stands twice, or a classification that cannot be.
    """
    if not request.outputs:
        return [Wanted(name) for name in OUTPUTS]
    found: dict[str, Wanted] = {}
    for each in request.outputs:
        if each.name not in OUTPUTS:
            raise invalid(f"no output is named {shown(each.name)}; there are {', '.join(OUTPUTS)}")
        if each.name in found:
            raise invalid(f"output {each.name!r} is asked for twice")
        found[each.name] = Wanted(each.name, _top(each))
    return list(found.values())


def _top(output: Any) -> int | None:
    if "classification" not in output.parameters:
        return None
    value = output.parameters["classification"]
    kind = value.WhichOneof("parameter_choice")
    top = getattr(value, kind) if kind in ("int64_param", "uint64_param") else 0
    if top < 1:
        raise invalid(f"output {output.name!r}: classification takes a number of classes, at least 1")
    if OUTPUTS[output.name] != "FP32":
        raise invalid(f"output {output.name!r} cannot be classified; logits and probabilities can")
    return int(top)


def encode(
    request: oip.ModelInferRequest,
    asked: list[Wanted],
    logits: NDArray[np.float32],
    probabilities: NDArray[np.float32],
    classes: tuple[str, ...],
) -> oip.ModelInferResponse:
    """Return the answer's message, its contents in the form, raw or typed, that the request's were in."""
    raw = bool(request.raw_input_contents)
    response = oip.ModelInferResponse(id=request.id)
    values: dict[str, NDArray[Any]] = {"logits": logits, "probabilities": probabilities}
    for each in asked:
        if each.name == "labels":
            _add(response, each.name, [classes[k] for k in logits.argmax(1)], (len(logits),), raw)
        elif each.top is not None:
            best = np.argsort(-values[each.name], axis=1, kind="stable")[:, : each.top]
            texts = [
                f"{values[each.name][row, k]:f}:{k}:{classes[k]}" for row, picked in enumerate(best) for k in picked
            ]
            _add(response, each.name, texts, best.shape, raw)
        else:
            tensor = response.outputs.add(name=each.name, datatype="FP32", shape=values[each.name].shape)
            if raw:
                response.raw_output_contents.append(values[each.name].astype("<f4", copy=False).tobytes())
            else:
                tensor.contents.fp32_contents.extend(values[each.name].ravel().tolist())
    return response


def _add(response: oip.ModelInferResponse, name: str, texts: list[str], shape: tuple[int, ...], raw: bool) -> None:
    """Add an output of text."""
    tensor = response.outputs.add(name=name, datatype="BYTES", shape=shape)
    elements = [text.encode() for text in texts]
    if raw:
        response.raw_output_contents.append(b"".join(struct.pack("<I", len(each)) + each for each in elements))
    else:
        tensor.contents.bytes_contents.extend(elements)
