"""Carrying a model over to unlabeled data of another domain."""
