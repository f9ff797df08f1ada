"""Adapting by gradients to an unlabeled stream at test time."""
