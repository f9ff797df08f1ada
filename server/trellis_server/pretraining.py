"""Models the cloud starts from, made by the platform's pretraining."""

from trellis.models.pretraining import read, train

__all__ = ["read", "train"]
