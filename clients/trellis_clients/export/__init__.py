"""From a trained model to an ONNX file for the edge: the app behind ``trellis export``.

Importing this package imports no torch and no ONNX; see ``models`` for a model in hand and ``runs`` for a finished run.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trellis.errors import PluginError

if TYPE_CHECKING:
    from trellis_clients.export.models import Report

PACKAGES = frozenset({"onnx", "onnxruntime", "onnxscript", "torch", "flwr"})
"""Imports that the extras ``train`` and ``export`` bring."""


def export_run(*arguments: Any, **options: Any) -> Report:
    """Export the model of a finished run; see ``trellis_clients.export.runs.export_run``.

    Raises:
        PluginError: the packages it needs are not installed.
    """
    return _worker("runs", "export_run")(*arguments, **options)


def export_model(*arguments: Any, **options: Any) -> Report:
    """Export a model in hand; see ``trellis_clients.export.models.export_model``.

    Raises:
        PluginError: the packages it needs are not installed.
    """
    return _worker("models", "export_model")(*arguments, **options)


def _worker(module: str, name: str) -> Callable[..., Report]:
    try:
        import onnxscript  # noqa: F401

        found: Callable[..., Report] = getattr(import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in PACKAGES:
            raise
        raise PluginError(
            "export-missing",
            f"exporting needs {error.name}, which is not installed: pip install '.[train,export]' in a checkout",
        ) from None
    return found
