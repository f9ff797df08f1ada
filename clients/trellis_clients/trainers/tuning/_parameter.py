"""Parameter tuning: a part of the weights, or a small change of them that can be folded in afterwards."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trellis_clients.trainers.tuning._encoder import Encoder, zeros


class Lora(nn.Module):
    """LoRA (Hu et al., ICLR 2022, section 4.1) on the query and value thirds of a joint projection to q, k and v.

    ``y = W x + alpha / rank * B A x`` with A drawn Kaiming-uniform and B zero, one pair for q and one for v. It is
    written out here and tested against this equation; the library PEFT, which has it too, is no dependency.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear, self.factor = linear, alpha / rank
        width = linear.out_features // 3
        self.a = nn.Parameter(torch.empty(2, rank, linear.in_features))
        for each in self.a:
            nn.init.kaiming_uniform_(each, a=math.sqrt(5))
        self.b = zeros(2, width, rank)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (self.factor * F.linear(F.linear(x, a), b) for a, b in zip(self.a, self.b, strict=True))
        out: Tensor = self.linear(x) + torch.cat([q, torch.zeros_like(q), v], -1)
        return out

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """Return one linear layer of the same function."""
        q, v = self.factor * self.b @ self.a
        merged = _linear_like(self.linear)
        merged.weight.copy_(self.linear.weight + torch.cat([q, torch.zeros_like(q), v]))
        if merged.bias is not None:
            merged.bias.copy_(self.linear.bias)
        return merged


class Rescaled(nn.Module):
    """SSF (Lian et al., NeurIPS 2022): ``scale * layer(x) + shift`` by channel.

    They start at 1 and 0, so that the start is the frozen function; the authors' code draws them from normal
    distributions about these, of deviation 0.02.
    """

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer = layer
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), zeros(channels)

    def _by_channel(self, values: Tensor) -> Tensor:
        return values.view(-1, 1, 1) if isinstance(self.layer, nn.Conv2d) else values

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._by_channel(self.scale) * self.layer(x) + self._by_channel(self.shift)
        return out

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """Return one layer of the same kind and function."""
        layer: Any = self.layer
        if isinstance(layer, nn.Linear):
            merged: Any = _linear_like(layer, bias=True)
        elif isinstance(layer, nn.Conv2d):
            merged = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride)  # type: ignore[arg-type]
        else:
            merged = nn.LayerNorm(layer.normalized_shape, eps=layer.eps)
        rows = self.scale.view(-1, *[1] * (layer.weight.dim() - 1))
        merged.weight.copy_(rows * layer.weight)
        bias = layer.bias if layer.bias is not None else torch.zeros_like(self.shift)
        merged.bias.copy_(self.scale * bias + self.shift)
        folded: nn.Module = merged.to(layer.weight.device)
        return folded


def low_rank(base: Encoder, rank: int, alpha: float) -> Encoder:
    """Put LoRA on every block's queries and values, in place."""
    for block in base.blocks:
        attention: Any = block.attn
        attention.qkv = Lora(attention.qkv, rank, alpha)
    return base


def rescaled(base: Encoder) -> Encoder:
    """Put scale and shift behind every convolution, linear layer and layer norm, in place."""
    for parent in list(base.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear | nn.LayerNorm | nn.Conv2d):
                setattr(parent, name, Rescaled(layer, len(layer.weight)))
    return base


def only_biases(base: Encoder) -> Encoder:
    """BitFit (Ben Zaken et al., ACL 2022): open every bias, the layer norms' shifts among them."""
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return base


def only_norms(base: Encoder) -> Encoder:
    """Open scale and shift of the layer norms."""
    for layer in base.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.requires_grad_(True)
    return base


def merged(model: nn.Module) -> nn.Module:
    """Fold every change that can be folded into the layer it belongs to, in place: nothing is left to pay at use."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Lora | Rescaled):
                setattr(parent, name, layer.folded())
    return model


def _linear_like(linear: nn.Linear, bias: bool | None = None) -> nn.Linear:
    wanted = linear.bias is not None if bias is None else bias
    return nn.Linear(linear.in_features, linear.out_features, bias=wanted, device=linear.weight.device)
