"""Local SGD, the client's part of federated averaging."""

from __future__ import annotations

from trellis.registry import register
from trellis_clients.trainer import Trainer, TrainerConfig


@register(
    "trainers",
    "sgd",
    paper="McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017",
    takes=("image", "vector", "tokens", "series", "points"),
    sends="weights",
)
class Sgd(Trainer):
    """Local SGD: E epochs of mini-batch SGD from the global model (Algorithm 1, ClientUpdate)."""

    class Config(TrainerConfig):
        """Nothing beyond the shared hyperparameters."""
