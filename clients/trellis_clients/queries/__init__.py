"""Questions that a strategy may put to any trainer's clients, one file each: ``query.<file name>``.

A file offers one function ``answer(trainer, model, data, state, turn) -> Metrics`` that fills ``turn.reply``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from torch import nn

from trellis.data.base import ClientData
from trellis.errors import PluginError, listed, nearest

if TYPE_CHECKING:
    from trellis_clients.trainer import Metrics, State, Trainer, Turn


def known() -> list[str]:
    """Return the names of the questions that every trainer knows."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def answer(trainer: Trainer, action: str, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
    """Answer a question by the file of its name.

    Raises:
        PluginError: no file has that name.
    """
    if action not in known():
        raise PluginError(
            "query-unknown",
            f"trainer {type(trainer).__name__} has no answer to {action!r}.{nearest(action, known())} "
            f"Known to every trainer: {listed(known()) or 'none'}",
        )
    metrics: Metrics = importlib.import_module(f"{__name__}.{action}").answer(trainer, model, data, state, turn)
    return metrics
