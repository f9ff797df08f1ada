"""A client's private state as Flower records and back.

Tensors go into an ArrayRecord by path; everything else is JSON in a ConfigRecord. Types that would need a
pickle are refused when the state is kept, with the path to the culprit.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from trellis import records
from trellis.errors import DataError

ARRAYS = "trellis.state.arrays"
VALUES = "trellis.state.values"


def pack(state: dict[str, Any]) -> RecordDict:
    """Return a state as records; an empty state gives empty records. Tensors are copied to the CPU.

    Raises:
        DataError: the state holds something other than tensors, arrays, numbers, text, bytes, lists, dicts.
    """
    if not state:
        return RecordDict()
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    tree = _pack(state, "state", arrays)
    content = RecordDict({VALUES: ConfigRecord({"json": json.dumps(tree)})})
    content[ARRAYS] = records.array_record(arrays)
    return content


def unpack(content: RecordDict, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the state that ``pack`` made records of. Its tensors may be changed in place."""
    if VALUES not in content:
        return {}
    tree = json.loads(str(records.config_record(content, VALUES)["json"]))
    arrays = {name: array.numpy() for name, array in records.array_records(content)[ARRAYS].items()}
    state: dict[str, Any] = _unpack(tree, arrays, torch.device(device))
    return state


def _pack(value: Any, path: str, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    if isinstance(value, Tensor):
        arrays[path] = value.detach().cpu().numpy().copy()
        return {"tensor": path}
    if isinstance(value, np.ndarray):
        arrays[path] = value.copy()
        return {"array": path}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str | int):
                raise DataError("state-type", f"{path}: key {key!r} is neither text nor an integer")
        return {"dict": [[key, _pack(v, f"{path}/{key}", arrays)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_pack(v, f"{path}/{i}", arrays) for i, v in enumerate(value)]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise DataError("state-type", f"{path}: {type(value).__name__} cannot be kept in a client's state")


def _unpack(tree: Any, arrays: dict[str, np.ndarray[Any, Any]], device: torch.device) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return torch.from_numpy(arrays[value]).to(device)
    if kind == "array":
        return arrays[value]
    if kind == "dict":
        return {key: _unpack(v, arrays, device) for key, v in value}
    if kind == "list":
        return [_unpack(v, arrays, device) for v in value]
    assert kind == "bytes", kind
    return base64.b64decode(value)
