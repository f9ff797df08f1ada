"""CLIP-Lite: image and text encoders learnt from pairs with one negative a pair."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.data.base import Batch, Split
from trellis.errors import PluginError
from trellis.registry import register
from trellis_clients.trainer import Metrics, NonNegative, Trainer, TrainerConfig, Turn, in_order
from trellis_clients.trainers.image_text._critic import (
    DotCritic,
    LookaheadSGD,
    MeanOfWords,
    info_nce,
    jensen_shannon,
    rolled,
)

Count = Annotated[int, Field(ge=1)]


class ClipLiteModel(nn.Module):
    """Two encoders, the critic that scores a pair, and the priors' discriminators of "image" and "text" features."""

    def __init__(self, image: nn.Module, text: nn.Module, critic: DotCritic, priors: nn.ModuleDict) -> None:
        super().__init__()
        self.image, self.text, self.critic, self.priors = image, text, critic, priors

    def features(self, x: Tensor) -> Tensor:
        """Return image features ``(n, D)``, which is what training is for."""
        features: Tensor = self.image.features(x)  # type: ignore[operator]
        return features


@register(
    "trainers",
    "clip-lite",
    summary="image and text encoders from pairs, one negative each",
    paper="Shrivastava et al., CLIP-Lite: Information Efficient Visual Representation Learning with Language"
    " Supervision, AISTATS 2023",
    takes=("pairs",),
    sends="weights",
)
class ClipLite(Trainer):
    """CLIP-Lite: a Jensen-Shannon bound on the information that image and caption share (loss.py of the authors' code).

    CLIP's bound cannot exceed the logarithm of the batch; this one has no such limit and needs one negative a pair, the
    batch's next caption. A critic with a learnt scale scores a pair of features, and the loss is mean softplus(-T) over
    pairs plus mean softplus(T) over negatives. No matrix of all pairs is made. The total is (1 - w) loss + w prior,
    where the prior tells image features, and with ``text_prior`` caption features too, from uniform noise. In the
    authors' code encoder and discriminator descend on the prior together (``prior: joint``); ``adversarial`` turns the
    gradient into the encoder around, which is the idea it comes from. SGD with Lookahead, one rate for the image
    encoder and one for the rest, scheduled over the steps of all rounds: a linear warm-up from zero, then a cosine.

    The image encoder is the scenario's model without its head; the text encoder is a mean of word vectors, for captions
    of a few words (the paper's is a sentence transformer). Left out: augmented views and captions, hard negatives from
    caption clusters, the other critics. ``objective: clip`` is the baseline: InfoNCE over the batch, all else alike,
    the priors too.

    Encoders, critic and discriminators travel. Lookahead's slow weights start anew from what the cloud sent, or a
    client would be drawn back to its own past; momentum starts at zero. Batch norm sits in critic and image encoder and
    follows ``batch_norm``. ``accuracy`` is of telling digits apart by the mean score of captions that name them,
    ``pair-accuracy`` of telling a pair from a negative by the score's sign.

    Found on captioned digits: at small batches and equal steps the features are better than an untrained encoder's, and
    those of InfoNCE better still, by 6.6 ± 4.3 points at batches of 8. With all digits equally bright 1.6 ± 2.0 of that
    are left (else every second negative differs in brightness, and can be told without a look at the digit). All others
    of the batch as negatives, without priors, are worth 2.2 ± 5.8 points. See ``benchmarks/claims``.
    """

    class Config(TrainerConfig):
        lr: Annotated[float, Field(gt=0)] = Field(0.02, description="of the image encoder; 0.2 in the paper")
        rest_lr: Annotated[float, Field(gt=0)] = Field(0.02, description="of the rest; 0.001 in the paper")
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
        weight_decay: NonNegative = 1e-4
        max_grad_norm: Annotated[float, Field(gt=0)] | None = 10.0
        batch_norm: Literal["average", "local"] = Field(
            "average",
            description="recalibration passes images alone, and the critic's statistics are of captions, too",
        )
        batch_size: Annotated[int, Field(ge=2)] = 32
        drop_last: Literal[False] = Field(False, description="no batch is smaller than the others")
        local_epochs: Literal[1] = Field(1, description="not used: local_steps says how long a turn is")
        local_steps: Count = Field(20, description="steps a turn, whatever the batch")
        objective: Literal["jensen-shannon", "clip"] = "jensen-shannon"
        units: Count = Field(64, description="of the critic; at least as many as either encoder's features")
        text_features: Count = 32
        prior: Literal["none", "joint", "adversarial"] = "joint"
        text_prior: bool = Field(True, description="a prior of caption features, too")
        prior_weight: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="w")
        lookahead_steps: Count = 5
        lookahead_rate: Annotated[float, Field(gt=0, le=1)] = 0.5
        warm_up: Annotated[float, Field(ge=0, lt=1)] = Field(
            0.05, description="share of all rounds' steps; 10,000 of 250,000 in the authors' run"
        )

    def build(self) -> ClipLiteModel:
        c, image = self.config, self.task.model()
        head = getattr(image, "head", None)
        if not isinstance(head, nn.Linear) or not callable(getattr(image, "features", None)):
            raise PluginError(
                "model-head", f"trainer 'clip-lite' needs a model with features(x) and head, not {type(image).__name__}"
            )
        width = head.in_features
        image.head = nn.Identity()  # classes are told apart by captions
        text = MeanOfWords(len(self.task.facts["vocabulary"]), c.text_features)
        critic = DotCritic(width, c.text_features, c.units)
        priors = nn.ModuleDict()
        if c.prior != "none" and c.prior_weight > 0:
            priors["image"] = discriminator(width)
            if c.text_prior:
                priors["text"] = discriminator(c.text_features)
        return ClipLiteModel(image, text, critic, priors)

    # -- training -------------------------------------------------------------------------------------

    def optimizer(self, model: nn.Module, turn: Turn) -> torch.optim.Optimizer:
        c = self.config
        image = [p for name, p in model.named_parameters() if name.startswith("image.")]
        rest = [p for name, p in model.named_parameters() if not name.startswith("image.")]
        return LookaheadSGD(
            [{"params": image, "lr": c.lr}, {"params": rest, "lr": c.rest_lr}],
            c.lookahead_steps,
            c.lookahead_rate,
            lambda taken: self.share(turn, taken),
            lr=c.lr,
            momentum=c.momentum,
            weight_decay=c.weight_decay,
        )

    def share(self, turn: Turn, taken: int) -> float:
        """Return the share of the rates after so many steps of a turn, as ``LinearWarmupCosineAnnealingLR`` has it.

        Of T steps in all rounds the first w rise from 0, the rest fall as cos^2 of (step - w) / (T - w) pi / 2.
        """
        steps: int = self.config.local_steps
        step, planned = max(turn.round - 1, 0) * steps + taken, max(turn.num_rounds, 1) * steps
        warm: int = round(self.config.warm_up * planned)
        if step < warm:
            return step / warm
        return math.cos(min((step - warm) / max(planned - warm, 1), 1.0) * math.pi / 2) ** 2

    def batches(self, split: Split, turn: Turn) -> Iterator[Batch]:
        """Yield ``local_steps`` batches of shuffled pairs: neighbours are each other's negatives."""
        size, order = min(self.config.batch_size, len(split)), torch.empty(0, dtype=torch.int64)
        for _ in range(self.config.local_steps if size else 0):
            if len(order) < size:
                order = torch.randperm(len(split), generator=turn.generator)
            yield split.batch(order[:size].to(split.rows.device))
            order = order[size:]

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:  # noqa: ARG002
        assert isinstance(model, ClipLiteModel)
        f, g = model.features(batch.x), model.text(batch.fields["tokens"])
        a, b = model.critic.sides(f, g)
        if self.config.objective == "clip":
            cross = info_nce(a, b)
        else:
            cross = jensen_shannon((a * b).sum(1), (a * rolled(b)).sum(1))
        if not model.priors:
            return cross
        features, adversarial = {"image": f, "text": g}, self.config.prior == "adversarial"
        priors = [prior(judge, features[name], adversarial) for name, judge in model.priors.items()]
        w: float = self.config.prior_weight
        return (1 - w) * cross + w * torch.stack(priors).sum()

    # -- use ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split, turn: Turn, batch_size: int = 256) -> Metrics:
        """Return the Jensen-Shannon ``loss`` of a split's pairs, ``pair-accuracy``, and ``accuracy`` by captions.

        A pair's negative is the split's next caption; that of a client's only test pair is its first training caption.

        Raises:
            DataError: there is but one pair, and no other to take a negative from.
        """
        assert isinstance(model, ClipLiteModel)
        model.eval()
        parts = [(model.features(b.x), model.text(b.fields["tokens"]), b.y) for b in in_order(split, batch_size)]
        f, g, y = (torch.cat(column) for column in zip(*parts, strict=True))
        a, b = model.critic.sides(f, g)
        if len(split) == 1 and turn.data is not None and len(turn.data.train):
            other = turn.data.train.batch(torch.zeros(1, dtype=torch.int64, device=f.device))
            _, against = model.critic.sides(f, model.text(other.fields["tokens"]))
        else:
            against = rolled(b)
        positive, negative = (a * b).sum(1), (a * against).sum(1)
        captions = self.task.facts["class_tokens"].to(f.device)  # (classes, m, T)
        texts = F.normalize(model.critic.text(model.text(captions.flatten(0, 1))))
        guesses = (a @ texts.view(*captions.shape[:2], -1).mean(1).T).argmax(1)
        return {
            "loss": float(jensen_shannon(positive, negative)),
            "accuracy": float((guesses == y).float().mean()),
            "pair-accuracy": float(((positive > 0).float().mean() + (negative < 0).float().mean()) / 2),
        }


def discriminator(features: int) -> nn.Module:
    """Return what tells features from noise; logits ``(n, 1)``. The paper's has 1000 and 200 units."""
    return nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))


def prior(judge: nn.Module, features: Tensor, adversarial: bool) -> Tensor:
    """Return -(mean log D(noise) + mean log(1 - D(features))) with uniform noise.

    ``adversarial`` turns the gradient into the features around.
    """
    if adversarial:
        features = 2 * features.detach() - features
    loss: Tensor = F.softplus(-judge(torch.rand_like(features))).mean() + F.softplus(judge(features)).mean()
    return loss
