"""Changing what a batch looks like before the model sees it."""
