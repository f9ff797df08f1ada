"""CLIP-Lite's bound with all other captions of the batch as negatives: tells what one negative costs, and nothing else.

A control of the measurements, not a method: the paper's point is that one negative is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.data.base import Batch
from trellis.registry import register
from trellis_clients.trainer import Turn
from trellis_clients.trainers.image_text.clip_lite import ClipLite, ClipLiteModel


@register("trainers", "clip-lite-all-negatives", takes=("pairs",), sends="weights")
class AllNegatives(ClipLite):
    """Mean softplus(-T) over pairs plus mean softplus(T) over the B (B - 1) others; give it ``prior: none``."""

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:
        del turn
        assert isinstance(model, ClipLiteModel)
        assert not model.priors
        a, b = model.critic.sides(model.features(batch.x), model.text(batch.fields["tokens"]))
        scores = a @ b.T
        others = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        return F.softplus(-scores.diagonal()).mean() + F.softplus(scores[others]).mean()
