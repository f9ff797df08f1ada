"""CutMix: paste a box of one image into another, and mix the labels by the areas that are left to see."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.data.base import Batch
from trellis.registry import register
from trellis_clients.trainer import Trainer, TrainerConfig, Turn


class Box(NamedTuple):
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right``, the ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


@register(
    "trainers",
    "cutmix",
    summary="CutMix: boxes pasted between images, labels mixed by area",
    paper="arXiv 1905.04899",
    takes=("image",),
    sends="weights",
)
class CutMix(Trainer):
    """Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV
    2019, section 3.

    With probability ``probability`` a batch is mixed (equations 1 and 2): one lambda from Beta(alpha, alpha), one
    permutation and one box a batch, as in the authors' code. The centre of the box is uniform over the pixels, so
    that the box is often cut off at the border; the label's lambda is computed anew from the area that is left,
    without which labels would claim pixels that are not there. The loss is the cross-entropy to the soft target.

    A box has even sides, being a centre and half a side to each way. On images of 8x8 one in sixteen is empty; data
    sets that enlarge their images (``data.size: 16``) lose less. The ablation on feature maps (the paper's "feature
    CutMix") is not here. Clients keep nothing and send all weights; a client whose examples are all of one class mixes
    images of that class, which leaves its labels as they are, and a batch of one image is left alone.
    """

    class Config(TrainerConfig):
        alpha: float = Field(1.0, ge=0.01, description="of the Beta distribution of lambda; 1 is uniform")
        probability: float = Field(0.5, ge=0, le=1, description="of mixing a batch; 1 on ImageNet")
        lambda_from_box: bool = Field(True, description="False keeps the lambda that was drawn, borders or not")

    config: Config

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:
        generator = turn.generator
        if float(torch.rand((), generator=generator)) >= self.config.probability:
            return super().loss(model, batch, turn)
        shape = batch.x.shape
        drawn = beta(self.config.alpha, generator)
        box = box_of(shape[-2:], drawn, tuple(int(torch.randint(side, (), generator=generator)) for side in shape[-2:]))
        order = torch.randperm(len(batch), generator=generator).to(batch.x.device)
        share = visible(shape[-2:], box) if self.config.lambda_from_box else drawn
        return F.cross_entropy(
            model(pasted(batch.x, order, box)), mixed_labels(batch.y, order, share, self.task.num_classes)
        )


def beta(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha), as one of two Gamma variables over their sum."""
    a, b = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator).tolist()
    return float(a / (a + b)) if a + b > 0 else 0.5


def box_of(sides: torch.Size | tuple[int, ...], share: float, centre: tuple[int, ...]) -> Box:
    """Return the box that would leave ``share`` of an image of ``(height, width)``, were it not for the border.

    Its sides are ``sqrt(1 - share)`` of the image's; ``centre`` is a row and a column.
    """
    ends: list[int] = []
    for side, middle in zip(sides, centre, strict=True):
        half = int(side * math.sqrt(1 - share)) // 2
        ends += [max(middle - half, 0), min(middle + half, side)]
    return Box(*ends)


def visible(sides: torch.Size | tuple[int, ...], box: Box) -> float:
    """Return the share of an image of ``(height, width)`` outside the box."""
    return 1 - box.area / math.prod(sides)


def pasted(x: Tensor, order: Tensor, box: Box) -> Tensor:
    """Return images ``(n, channels, height, width)`` whose box is that of the images ``x[order]``; x is left alone."""
    mixed = x.clone()
    rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
    mixed[:, :, rows, columns] = x[order][:, :, rows, columns]
    return mixed


def mixed_labels(y: Tensor, order: Tensor, share: float, classes: int) -> Tensor:
    """Return soft targets ``(n, classes)``: ``share`` of a batch's own labels, the rest of those of ``order``."""
    own = F.one_hot(y, classes).to(torch.get_default_dtype())
    return share * own + (1 - share) * own[order]
