"""Bundled data sets, one per file."""
