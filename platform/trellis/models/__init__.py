"""Small task models, and any model of timm by name.

Importing this package imports no model and no torch: it only knows where the plug-ins lie.
"""

from __future__ import annotations

from trellis import registry


def models() -> list[registry.Plugin]:
    """List the bundled models by file name."""
    return registry.folder("models", "trellis.models.zoo")
