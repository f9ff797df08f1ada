"""A vision transformer for small images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trellis.errors import DataError
from trellis.models._base import Classifier, Plain, Shape, image_shape
from trellis.registry import register
from trellis.scenario import Strict


class Attention(nn.Module):
    """Multi-head self-attention over tokens ``(n, T, D)``: Vaswani et al. 2017, section 3.2."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.project(mixed.transpose(1, 2).reshape(n, tokens, dim))
        return out


class Block(nn.Module):
    """Attention, then two linear layers, each behind a layer norm and around a shortcut (pre-norm)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(Classifier):
    """Patches as tokens, a class token first, learnt positions; the class token's last state is the feature.

    Attributes:
        patchify: convolution from images to patch tokens.
        class_token: ``(1, 1, D)``.
        positions: ``(1, 1 + patches, D)``.
        blocks: the encoder, ``depth`` blocks.
        norm: the final layer norm.
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, patch: int, dim: int, depth: int, heads: int, mlp_ratio: int
    ) -> None:
        super().__init__()
        channels, height, width = shape
        patches = (height // patch) * (width // patch)
        self.patchify = nn.Conv2d(channels, dim, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, 1 + patches, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.positions, std=0.02)
        nn.init.normal_(self.class_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def embed(self, x: Tensor) -> Tensor:
        """Return the encoder's input for images: tokens ``(n, 1 + patches, D)``, positions added."""
        patches = self.patchify(x).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(x), -1, -1), patches], 1) + self.positions

    def features(self, x: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Return the class token after the final norm, ``(n, D)``.

        ``prompts`` of shape ``(P, D)`` are inserted once, between the class token and the patches, without positions
        of their own (Jia et al., ECCV 2022, "shallow").
        """
        tokens = self.embed(x)
        if prompts is not None:
            tokens = torch.cat([tokens[:, :1], prompts.expand(len(x), -1, -1), tokens[:, 1:]], 1)
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.norm(tokens[:, 0])
        return out


@register("models", "vit", summary="a small vision transformer", paper="arXiv 2010.11929")
class Vit(Plain):
    """Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 3.1, at the size of small images.

    Without dropout. ``dim: 768, depth: 12, heads: 12, patch: 16`` on 3x224x224 with 1000 classes is their ViT-B/16
    (86.6 M weights).
    """

    class Config(Strict):
        patch: int = Field(2, ge=1, description="side of a patch in pixels; divides height and width")
        dim: int = Field(32, ge=1, description="width of a token; a multiple of heads")
        depth: int = Field(4, ge=1, description="blocks")
        heads: int = Field(4, ge=1)
        mlp_ratio: int = Field(2, ge=1, description="width of the hidden layer in units of dim; 4 in the paper")

    config: Config

    def build(self, shape: Shape, num_classes: int, facts: Mapping[str, Any]) -> nn.Module:
        del facts
        config = self.config
        image = image_shape(shape, "vit", config.patch)
        if image[1] % config.patch or image[2] % config.patch:
            raise DataError(
                "model-shape", f"model 'vit' needs images whose sides {config.patch} divides; these are {image[1:]}"
            )
        if config.dim % config.heads:
            raise DataError("model-shape", f"model.dim={config.dim} is not a multiple of model.heads={config.heads}")
        return VisionTransformer(
            image, num_classes, config.patch, config.dim, config.depth, config.heads, config.mlp_ratio
        )
