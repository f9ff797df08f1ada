"""Bundled trainers, one file each, in folders by family. A file's name is the trainer's name."""

from __future__ import annotations

from trellis.registry import Plugin, folder


def trainers() -> list[Plugin]:
    """List the bundled trainers without importing them."""
    return folder("trainers", __name__)
