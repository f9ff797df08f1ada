"""Strategies: what the cloud asks of clients and how it merges their answers.

Bundled ones are the files of this folder; every strategy of the installed Flower is offered beside them,
under its class name in lower case (``fedavgm``), its privacy wrappers under shorter ones (``dp-server-fixed``).
"""

from __future__ import annotations

from trellis import registry
from trellis.registry import Plugin
from trellis_server.strategies._build import Base, BuildContext, Sampling, build_base, build_strategy, sampling

__all__ = ["Base", "BuildContext", "Sampling", "build_base", "build_strategy", "sampling", "strategies"]


def strategies() -> list[Plugin]:
    """List the strategies of this folder and of the installed Flower."""
    from trellis_server.strategies import _flower  # imports flwr

    return [*registry.folder("strategies", __name__), *_flower.plugins()]
