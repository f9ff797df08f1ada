"""SCAFFOLD: local steps corrected by the difference of the cloud's and the client's control variates."""

from __future__ import annotations

import torch
from torch import nn

from trellis.data.base import ClientData
from trellis.registry import register
from trellis_clients.trainer import Metrics, State, Trainer, TrainerConfig, Turn


@register(
    "trainers",
    "scaffold",
    paper="Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, ICML 2020",
    takes=("image", "vector", "tokens", "series", "points"),
    sends="scaffold",
    payload="weights, control variates",
    replies=("control",),
    strategies=("scaffold",),
)
class Scaffold(Trainer):
    """SCAFFOLD's client (Algorithm 1, option II): y <- y - lr · (g(y) - c_i + c).

    After K steps the client's control becomes c_i+ = c_i - c + (x - y) / (K · lr). It stays on the client;
    only c_i+ - c_i travels, as the ArrayRecord ``control`` beside the weights. The paper's local step is
    plain SGD: the identity for c_i+ does not hold with momentum or weight decay, so both must be zero.
    """

    class Config(TrainerConfig):
        momentum: float = 0.0
        weight_decay: float = 0.0

        def model_post_init(self, _: object) -> None:
            if self.momentum or self.weight_decay:
                raise ValueError("scaffold's control variates need plain SGD: momentum and weight_decay must be 0")

    def fit(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        control = turn.received["control"]
        state.setdefault("control", {name: torch.zeros_like(values) for name, values in control.items()})
        self.steps = 0
        metrics = super().fit(model, data, state, turn)
        own, start, end = state["control"], turn.received["arrays"], self.shared(model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        delta = {}
        for name in sorted(trained & control.keys()):
            delta[name] = (start[name] - end[name]) / (max(self.steps, 1) * self.config.lr) - control[name]
            own[name] = own[name] + delta[name]
        turn.reply["control"] = delta
        return metrics

    def adjust_gradients(self, model: nn.Module, state: State, turn: Turn) -> None:
        super().adjust_gradients(model, state, turn)
        own, control = state["control"], turn.received["control"]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and name in control:
                parameter.grad += control[name] - own[name]
        self.steps += 1
