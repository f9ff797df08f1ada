"""Bundled partitioners, one per file."""
