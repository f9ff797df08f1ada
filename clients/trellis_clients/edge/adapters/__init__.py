"""Test-time adaptation by forward passes alone: adapters that take a stream in order and return predictions.

====================  ============================================  ==============================================
adapter               what it changes                               where it fails
====================  ============================================  ==============================================
``none``              nothing
``prediction-bn``     statistics that batch norms normalise by      small batches; batches of one or two classes
``t3a``               the linear head, by confident features        gains little; wrong supports stay
``lame``              the batch's probabilities, by neighbours      shuffled streams
``foa``               prompts of a transformer, by evolution        no transformer; no time for tens of forwards
====================  ============================================  ==============================================

They know a model through ``Predictor`` only, so torch and ONNX Runtime serve alike. Importing this package imports no
adapter: the libraries of one (``cma``) are loaded where it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pydantic import ValidationError

from trellis.errors import DataError, PluginError, listed, nearest
from trellis_clients.edge.adapters._base import Adapter, State
from trellis_clients.edge.predictor import Predictor

__all__ = ["NAMES", "Adapter", "State", "create", "named"]

_CLASSES = {
    "none": ("none", "Unadapted"),
    "prediction-bn": ("prediction_bn", "PredictionBatchNorm"),
    "t3a": ("t3a", "T3A"),
    "lame": ("lame", "Lame"),
    "foa": ("foa", "Foa"),
}
NAMES = tuple(_CLASSES)


def named(name: str) -> type[Adapter]:
    """Return an adapter's class.

    Raises:
        PluginError: no adapter has that name.
    """
    if name not in _CLASSES:
        raise PluginError(
            "adapter-unknown", f"no adapter is called {name!r}.{nearest(name, NAMES)} There are {listed(NAMES)}"
        )
    module, attribute = _CLASSES[name]
    found: type[Adapter] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return found


def create(name: str, predictor: Predictor, **options: Any) -> Adapter:
    """Return an adapter for a model, at the start of a stream.

    Args:
        name: one of ``NAMES``.
        predictor: the model.
        **options: fields of the adapter's ``Config``; the rest keeps its defaults.

    Raises:
        PluginError: no adapter has that name.
        DataError: an option is unknown or out of range, or the model lacks what the adapter changes.
    """
    cls = named(name)
    try:
        config = cls.Config.model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = cls.Config.model_fields
            message = f"adapter {name!r} has no option {key!r}.{nearest(key, known)}"
            message += f" Allowed here: {listed(known)}" if known else " It has none"
        else:
            reason = problem["msg"].removeprefix("Value error, ")
            where = f"{key}={problem['input']!r}: " if key else ""
            message = f"adapter {name!r}: {where}{reason}"
        raise DataError("adapter-option", message) from None
    return cls(config, predictor)
