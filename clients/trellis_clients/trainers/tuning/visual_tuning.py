"""Visual tuning: one frozen transformer, and the four ways of fitting it to new data by few parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trellis.data.base import ClientData
from trellis.models._base import Classifier
from trellis.registry import register
from trellis_clients.trainer import Metrics, State, Trainer, TrainerConfig, Turn
from trellis_clients.trainers.tuning import _adapter, _parameter
from trellis_clients.trainers.tuning._base import BaseConfig, frozen_base
from trellis_clients.trainers.tuning._encoder import Encoder
from trellis_clients.trainers.tuning._prompt import Prompted
from trellis_clients.trainers.tuning._remapping import Ladder, Side

HEAD = "head."


class Tuned(Classifier):
    """Tuned encoder and new head. What is frozen stays in evaluation mode whatever mode the rest is in."""

    def __init__(self, body: nn.Module, head: nn.Linear, still: Iterable[nn.Module]) -> None:
        super().__init__()
        self.body, self.head, self.still = body, head, tuple(still)

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out

    def train(self, mode: bool = True) -> Tuned:
        super().train(mode)
        for module in self.still:
            module.training = False
        return self


@register(
    "trainers",
    "visual-tuning",
    summary="prompt, adapter, parameter or remapping tuning of a frozen vision transformer",
    paper="arXiv 2305.06061",
    takes=("image",),
    sends="weights",
    payload="tuned parameters",
)
class VisualTuning(Trainer):
    """Yu et al., "Visual Tuning", ACM Computing Surveys 2024: its families over one frozen backbone, by ``kind``.

    - ``prompt``: VPT, shallow or deep (``prompt``).
    - ``adapter``: AdaptFormer's bottleneck beside the MLP, or Pfeiffer's after it (``adapter``).
    - ``parameter``: LoRA, BitFit, SSF or the layer norms (``parameter``).
    - ``remapping``: a ladder on the encoder's states, or a side network (``remapping``).
    - ``linear`` (the head alone) and ``full`` (everything) are the survey's references.

    Each is the publication's recipe as its class here says; the survey's language prompts need a text tower and are not
    here, nor is distillation. All but prompts and remapping start at the frozen model's own function. AdamW on what is
    tuned, without decay for vectors (biases, scales, gates), at a rate that rises and falls as a cosine round by round.
    Rates differ by ten or a hundred times between kinds, so that a comparison must choose one for each.

    **Federated.** The base is never averaged: every side builds it alike (or reads it from a file), and what crosses
    the wire is what is tuned. With ``base.sent`` it is among the arrays, for strategy ``partial`` to send once. An
    average of B A is not B's average times A's, so LoRA's A stays as every side drew it, unless ``lora_a`` says
    otherwise. ``personal`` keeps the head, or all but the head, on the client.

    Pretrained weights are not downloaded: on the data set ``novel-digits`` the base learns its digits 0 to 4, which is
    a real pretraining of a small model on few classes, and no ImageNet. What each way is worth on such bases, and what
    more digits and longer pretraining change, is measured in benchmarks/claims.
    """

    class Config(TrainerConfig):
        kind: Literal["prompt", "adapter", "parameter", "remapping", "linear", "full"] = "prompt"
        prompt: Literal["shallow", "deep"] = "deep"
        adapter: Literal["parallel", "sequential"] = "parallel"
        parameter: Literal["lora", "bitfit", "ssf", "norm"] = "lora"
        remapping: Literal["ladder", "side"] = "ladder"
        prompts: int = Field(
            4, ge=0, description="tokens per prompted block; more than a quarter of the patches is much, but is taken"
        )
        bottleneck: int = Field(8, ge=1, description="inner width of an adapter; 64 for ViT-B")
        scale: float = Field(1.0, gt=0, description="what an adapter's output is multiplied by; 0.1 in AdaptFormer")
        dropout: float = Field(0.1, ge=0, lt=1, description="on prompts, and inside adapters")
        rank: int = Field(4, ge=1, description="of LoRA")
        alpha: float = Field(8.0, gt=0, description="LoRA's change is multiplied by alpha / rank")
        lora_a: Literal["frozen", "trained"] = Field("frozen", description="frozen: the average of B is exact")
        reduction: int = Field(4, ge=1, description="the ladder's width is the encoder's over this; 8 in the paper")
        side_width: int = Field(8, ge=1, description="channels of the side network's first block")
        personal: Literal["nothing", "head", "tuned"] = Field("nothing", description="what stays on the client")
        warmup: float = Field(0.1, ge=0, lt=1, description="share of the rounds in which the rate rises")
        base: BaseConfig = BaseConfig()
        lr: float = Field(5e-3, gt=0, description="of AdamW, at its highest")
        weight_decay: float = Field(1e-4, ge=0)

    config: Config
    base_names: tuple[str, ...] = ()

    def build(self) -> Tuned:
        base = frozen_base(self.task, self.config.base)
        still = () if self.config.kind == "full" else tuple(base.modules())
        body = self._injected(base)
        model = Tuned(body, nn.Linear(base.width, self.task.num_classes), still)
        tuned = trained(model)
        self.base_names = tuple(
            name for name, v in model.state_dict().items() if name not in tuned and v.is_floating_point()
        )
        return model

    def _injected(self, base: Encoder) -> nn.Module:
        """Add what the kind adds to the frozen base; what is to be trained requires a gradient."""
        c = self.config
        if c.kind == "prompt":
            return Prompted(base, c.prompts, c.prompt == "deep", c.dropout)
        if c.kind == "adapter":
            return _adapter.adapted(base, c.adapter == "parallel", c.bottleneck, c.scale, c.dropout)
        if c.kind == "remapping":
            return Ladder(base, c.reduction) if c.remapping == "ladder" else Side(base, self.task.shape, c.side_width)
        if c.kind == "full":
            return base.requires_grad_(True)
        if c.kind == "linear":
            return base
        if c.parameter == "lora":
            tuned = _parameter.low_rank(base, c.rank, c.alpha)
            for name, values in tuned.named_parameters():
                if name.endswith(".qkv.a"):
                    values.requires_grad_(c.lora_a == "trained")
            return tuned
        return {"bitfit": _parameter.only_biases, "norm": _parameter.only_norms, "ssf": _parameter.rescaled}[
            c.parameter
        ](base)

    # -- what crosses the wire ------------------------------------------------------------------------

    def kept(self, model: nn.Module) -> set[str]:
        if self.config.personal == "nothing":
            return super().kept(model)
        return {name for name in trained(model) if name.startswith(HEAD) == (self.config.personal == "head")}

    def shared(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what is tuned and not personal, and the base if it is sent."""
        kept, state = self.kept(model), model.state_dict()
        names = [name for name in trained(model) if name not in kept]
        return {name: state[name] for name in (*names, *(self.base_names if self.config.base.sent else ()))}

    def frozen(self, number: int) -> tuple[str, ...]:  # noqa: ARG002
        return self.base_names if self.config.base.sent else ()

    # -- training -------------------------------------------------------------------------------------

    def optimizer(self, model: nn.Module, turn: Turn) -> torch.optim.Optimizer:
        open_ = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in open_ if p.dim() > 1], "weight_decay": self.config.weight_decay},
            {"params": [p for p in open_ if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.config.lr * self.rate(turn))

    def rate(self, turn: Turn) -> float:
        """Return the share of the learning rate that a round has."""
        if turn.progress < self.config.warmup:
            return min((turn.progress + 1 / turn.num_rounds) / self.config.warmup, 1.0)
        return 0.5 * (1 + math.cos(math.pi * (turn.progress - self.config.warmup) / (1 - self.config.warmup)))

    def fit(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        metrics = super().fit(model, data, state, turn)
        tuned, whole = (sum(p.numel() for p in each) for each in (trained(model).values(), model.parameters()))
        return metrics | {"tuned-values": tuned, "tuned-share": tuned / whole}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are tuned, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
