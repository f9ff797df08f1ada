"""Bundled models, one per file."""
