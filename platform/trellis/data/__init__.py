"""Data sets, and how they are dealt out to clients.

Importing this package imports no data set and no torch: it only knows where the plug-ins lie. What data turn into
is in ``trellis.data.base``; ``trellis.data.loading`` makes a federation from a scenario.
"""

from __future__ import annotations

from trellis import registry


def datasets() -> list[registry.Plugin]:
    """List the bundled data sets by file name."""
    return registry.folder("datasets", "trellis.data.sets")


def partitioners() -> list[registry.Plugin]:
    """List the bundled partitioners by file name."""
    return registry.folder("partitioners", "trellis.data.partition")
