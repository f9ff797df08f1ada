"""Prompt tuning: learnt tokens beside an image's own (Jia et al., ECCV 2022, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trellis_clients.trainers.tuning._encoder import Encoder


class Prompted(nn.Module):
    """A frozen encoder with ``count`` prompts after the class token, before the first block or before every one.

    Deep prompts take the places of the former block's: what a block makes of its prompts goes no further. Prompts have
    no positions. They start uniform in ±sqrt(6 / (channels * patch area + width)), as in the authors' code, whose 3
    channels are here as many as the images have. Dropout draws a mask for each image, as there.
    """

    def __init__(self, base: Encoder, count: int, deep: bool, dropout: float) -> None:
        super().__init__()
        self.base = base
        limit = math.sqrt(6 / (base.fan_in + base.width))
        layers = len(base.blocks) if deep else 1
        self.prompts = nn.Parameter(torch.empty(layers, count, base.width).uniform_(-limit, limit))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        tokens, first, count = self.base.embed(x), self.base.prefix, self.prompts.shape[1]
        rest = tokens[:, first:]
        for number, block in enumerate(self.base.blocks):
            if number < len(self.prompts):
                own = self.dropout(self.prompts[number].expand(len(x), -1, -1))
                tokens = torch.cat([tokens[:, :first], own, rest], 1)
            tokens = block(tokens)
            rest = tokens[:, first + count :]
        return self.base.read_out(tokens)
