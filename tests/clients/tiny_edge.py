"""A model of a few lines with a normalisation layer, in NumPy, and a server around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np

from trellis.errors import DataError
from trellis_clients.edge import service
from trellis_clients.edge.generated import open_inference_pb2 as oip
from trellis_clients.edge.model import Model
from trellis_clients.edge.predictor import Prediction
from trellis_clients.edge.preprocessing import Preprocessing
from trellis_clients.edge.runtime import Runtime, Settings
from trellis_clients.edge.server import Address, EdgeServer

SHAPE = (1, 4, 4)
CLASSES = ("ant", "bee", "cat")
PREPROCESSING = Preprocessing((0.5,), (0.25,))
SERVICE = "/inference.GRPCInferenceService/"


class Tiny:
    """A layer norm without statistics, and a linear head."""

    classes = CLASSES
    shape = SHAPE
    prompt_width = None
    has_batch_norm = False

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.head = (rng.normal(size=(3, 16)).astype(np.float32), rng.normal(size=3).astype(np.float32))
        self._affine = {"norm.weight": np.ones(16, np.float32), "norm.bias": np.zeros(16, np.float32)}

    def __call__(self, x: Any, *, prior: Any = None, prompts: Any = None, shift: Any = None) -> Prediction:
        features = (x.reshape(len(x), -1) * self._affine["norm.weight"] + self._affine["norm.bias"]).astype(np.float32)
        weight, bias = self.head
        moved = features if shift is None else features + shift
        return Prediction(moved @ weight.T + bias, features, None)

    def affine(self) -> dict[str, Any]:
        return {name: values.copy() for name, values in self._affine.items()}

    def load_affine(self, arrays: Mapping[str, Any]) -> None:
        for name, values in arrays.items():
            if name not in self._affine or values.shape != (16,) or not np.isfinite(values).all():
                raise DataError("edge-affine", f"{name!r} does not fit")
        self._affine |= {name: np.array(values, np.float32) for name, values in arrays.items()}


def tiny_model(seed: int = 0, predictor: Any = None) -> Model:
    return Model(predictor or Tiny(seed), "tiny", f"seed-{seed}", PREPROCESSING, "input")


def images(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(n, *SHAPE)).astype(np.float32)


def request(x: Any, *, raw: bool = True, datatype: str = "FP32", name: str = "input", model: str = "tiny") -> Any:
    """Return a well-formed request for a batch of floats."""
    message = oip.ModelInferRequest(model_name=model)
    tensor = message.inputs.add(name=name, datatype=datatype, shape=x.shape)
    if raw:
        message.raw_input_contents.append(x.tobytes())
    else:
        field = {"FP32": "fp32_contents", "FP64": "fp64_contents", "UINT8": "uint_contents", "INT64": "int64_contents"}
        getattr(tensor.contents, field[datatype]).extend(x.ravel().tolist())
    return message


def floats(response: Any, name: str) -> Any:
    """Return a floating-point output of a raw response."""
    k = [each.name for each in response.outputs].index(name)
    return np.frombuffer(response.raw_output_contents[k], "<f4").reshape(tuple(response.outputs[k].shape))


@contextmanager
def serving(
    runtime: Runtime | None = None, settings: Settings | None = None, **address: Any
) -> Iterator[tuple[EdgeServer, grpc.Channel]]:
    """A server on a free port, and a channel to it."""
    address = {"grpc": "127.0.0.1:0", "metrics": None} | address
    server = EdgeServer(runtime or Runtime(tiny_model(), settings), Address(**address))
    server.start()
    with grpc.insecure_channel(server.where) as channel:
        yield server, channel
    server.stop(1)


def call(channel: grpc.Channel, method: str, message: Any, timeout: float | None = 20) -> Any:
    """Call a method of the protocol with a message, or with bytes that claim to be one."""
    data = message if isinstance(message, bytes) else message.SerializeToString()
    answer = channel.unary_unary(SERVICE + method)(data, timeout=timeout)
    return getattr(oip, service.SERVICE.methods_by_name[method].output_type.name).FromString(answer)


def refused(channel: grpc.Channel, message: Any, method: str = "ModelInfer") -> grpc.RpcError:
    """Return the error that a call ends in."""
    try:
        call(channel, method, message)
    except grpc.RpcError as error:
        return error
    raise AssertionError("answered")
