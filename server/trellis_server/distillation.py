"""Selective entropy distillation: the losses of CEMA's cloud, and batch renormalisation for its models.

Everything here is about logits and models; who uploaded what is the business of ``cloud_adaptation``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trellis.models.adaptation import entropy


def confidence(logits: Tensor, e_max: float) -> Tensor:
    """Return the weight ``exp(E_max - E(x))`` of every sample, a constant to the gradient. Shape ``(n,)``."""
    return (e_max - entropy(logits.detach())).exp()


def entropy_loss(logits: Tensor, e_max: float) -> Tensor:
    """Return the mean entropy, weighted by confidence: the surest samples count most."""
    return (confidence(logits, e_max) * entropy(logits)).mean()


@dataclass(frozen=True)
class Weights:
    """How much each term of the loss counts: the student's entropy, KL divergence and cross-entropy to the teacher."""

    entropy: float = 3.0
    kl: float = 3.0
    ce: float = 1.0


def distillation_loss(
    student: Tensor, teacher: Tensor, e_max: float, weights: Weights, temperature: float = 1.0
) -> Tensor:
    """Return the loss of the edge copy.

    ``a * mean(u_s E_s) + b * mean(u_t KL(teacher || student) T^2) + g * mean(u_t CE(student, argmax teacher))``, where
    u are the confidences of student and teacher, both constants.

    Args:
        student: logits of the edge copy, ``(n, classes)``.
        teacher: logits of the foundation model on the same images; a constant.
        e_max: E_max^0, in nats.
        weights: a, b and g.
        temperature: T.
    """
    teacher = teacher.detach()
    trust = confidence(teacher, e_max)
    log_student = F.log_softmax(student / temperature, 1)
    kl = F.kl_div(log_student, F.log_softmax(teacher / temperature, 1), reduction="none", log_target=True).sum(1)
    ce = F.cross_entropy(student, teacher.argmax(1), reduction="none")
    return (
        weights.entropy * entropy_loss(student, e_max)
        + weights.kl * temperature**2 * (trust * kl).mean()
        + weights.ce * (trust * ce).mean()
    )


class Renormalised:
    """Test-time batch renormalisation of every batch-norm layer of a model.

    With batch mean m and deviation s, running mean M and deviation S, a layer gives
    ``((x - m) / s * (s / S) + (m - M) / S) * scale + shift`` with the factor s / S and the term (m - M) / S constants
    to the gradient: the value is that of normalising by the running statistics, the gradient is that of normalising by
    the batch's. It is done by giving the layer, in evaluation mode, an input of the same value whose gradient flows
    through m and s; so it works for any kind of batch-norm layer. The running statistics then move by the layer's
    momentum towards the batch's, but only while ``adapting``. The very first batch replaces them.

    Args:
        model: stays in evaluation mode for good; hooks are added to its layers.
        follow: False leaves the running statistics as they are for good, the first batch's included.
    """

    def __init__(self, model: nn.Module, *, follow: bool = True) -> None:
        self.model = model.eval()
        self.follow = follow
        self.adapting = False
        self.started = not follow
        self._batch: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after)

    def __call__(self, x: Tensor, *, adapting: bool) -> Tensor:
        """Return logits; with gradient and moving statistics while adapting, else neither."""
        self.adapting = adapting
        with torch.set_grad_enabled(adapting):
            logits: Tensor = self.model(x)
        self.started = True
        return logits

    def _before(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        assert isinstance(layer, _BatchNorm)
        if self.started and not self.adapting:
            return None
        x = inputs[0]
        over = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x, over, keepdim=True)
        if not self.started:
            layer.running_mean, layer.running_var = mean.detach().flatten(), var.detach().flatten()
        if not self.adapting:
            return None
        if self.follow:
            self._batch[layer] = mean.detach().flatten(), var.detach().flatten()
        std = (var + layer.eps).sqrt()
        return ((x - mean) / std * std.detach() + mean.detach(),)

    def _after(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del inputs, output
        if layer not in self._batch:
            return
        assert isinstance(layer, _BatchNorm)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, var = self._batch.pop(layer)
        rate = 0.1 if layer.momentum is None else layer.momentum
        # New tensors: the backward pass still needs the old ones.
        layer.running_mean = layer.running_mean.lerp(mean, rate)
        layer.running_var = layer.running_var.lerp(var, rate)
