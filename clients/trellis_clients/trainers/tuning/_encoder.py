"""A vision transformer as its parts, whoever made it: the zoo's ``vit`` or one of timm's.

Both are pre-norm: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``, with the class token as the read-out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from trellis.errors import PluginError
from trellis.models.zoo.vit import VisionTransformer


class Encoder(nn.Module, ABC):
    """Images to features ``(n, width)`` by way of tokens ``(n, T, width)``.

    Attributes:
        width: of a token.
        prefix: tokens before those of the patches, the class token first.
        fan_in: values of a patch, channels times its area.
    """

    width: int
    prefix: int
    fan_in: int

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The transformer's blocks, in order; they may be replaced one by one."""

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Return the tokens that enter the first block."""

    @abstractmethod
    def read_out(self, tokens: Tensor) -> Tensor:
        """Return the features of the tokens that leave the last block."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        for block in self.blocks:
            tokens = block(tokens)
        return self.read_out(tokens)


class ZooEncoder(Encoder):
    """The zoo's ``vit`` without its head."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        model.head = nn.Identity()  # type: ignore[assignment]
        self.model = model
        self.width, self.prefix, self.fan_in = model.positions.shape[-1], 1, model.patchify.weight[0].numel()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.blocks

    def embed(self, x: Tensor) -> Tensor:
        return self.model.embed(x)

    def read_out(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.model.norm(tokens[:, 0])
        return out


class TimmEncoder(Encoder):
    """A vision transformer of timm without its classifier."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.width, self.prefix = int(body.embed_dim), int(body.num_prefix_tokens)
        self.fan_in = body.patch_embed.proj.weight[0].numel()

    @property
    def blocks(self) -> nn.Sequential:
        blocks: nn.Sequential = self.body.blocks
        return blocks

    def embed(self, x: Tensor) -> Tensor:
        body = self.body
        out: Tensor = body.norm_pre(body.patch_drop(body._pos_embed(body.patch_embed(x))))
        return out

    def read_out(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.body.forward_head(self.body.norm(tokens), pre_logits=True)
        return out


def encoder_of(model: nn.Module) -> Encoder:
    """Take a scenario's model apart.

    Raises:
        PluginError: it is no vision transformer with a class token.
    """
    if isinstance(model, VisionTransformer):
        return ZooEncoder(model)
    body: Any = getattr(model, "body", None)
    parts = ("patch_embed", "_pos_embed", "patch_drop", "norm_pre", "blocks", "norm", "forward_head", "global_pool")
    if all(hasattr(body, part) for part in parts) and body.global_pool == "token":
        model.head = nn.Identity()
        return TimmEncoder(body)
    raise PluginError(
        "tuning-model",
        f"visual tuning takes a vision transformer with a class token (model 'vit', or one of timm's); "
        f"{type(model).__name__} is none",
    )


def attended(block: Any, x: Tensor) -> Tensor:
    """Return a block's state after its attention, ``x + attention(norm1(x))``."""
    out: Tensor = x + _scaled(block, "ls1", block.attn(block.norm1(x)))
    return out


def digested(block: Any, x: Tensor) -> Tensor:
    """Return what a block's MLP adds to the state after attention, ``mlp(norm2(x))``."""
    return _scaled(block, "ls2", block.mlp(block.norm2(x)))


def _scaled(block: Any, name: str, x: Tensor) -> Tensor:
    """Apply timm's layer scale, where a block has one. Stochastic depth is off in evaluation mode."""
    scale = getattr(block, name, None)
    out: Tensor = x if scale is None else scale(x)
    return out


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))
