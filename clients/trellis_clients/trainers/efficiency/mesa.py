"""Mesa: exact forward passes whose activations are kept for the backward pass in eight bits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from trellis.data.base import Batch, ClientData
from trellis.models.zoo import vit
from trellis.registry import register
from trellis_clients.trainer import Metrics, State, Task, Trainer, TrainerConfig, Turn
from trellis_clients.trainers.efficiency._activations import Compression, cover
from trellis_clients.trainers.efficiency._codes import DECAY, Range
from trellis_clients.trainers.efficiency._memory import Count

RANGES = "ranges"
"""Key of a client's state: the running ranges of its activations, by layer."""


class Attention(nn.Module):
    """The attention of the bundled transformer, step by step, so that each product's operands can be kept small.

    The fused product of torch keeps no matrix of attention but computes it anew; Mesa is about those that keep it.
    """

    def __init__(self, fused: vit.Attention) -> None:
        super().__init__()
        self.heads, self.qkv, self.project = fused.heads, fused.qkv, fused.project

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * (dim // self.heads) ** -0.5).softmax(-1)
        out: Tensor = self.project((weights @ v).transpose(1, 2).reshape(n, tokens, dim))
        return out


COVERED = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d, nn.GELU, nn.Softmax, nn.ReLU, Attention)
"""Layers whose activations are compressed; whatever a model computes outside of them keeps what it keeps."""


@register(
    "trainers",
    "mesa",
    summary="activations kept for the backward pass in 8 bits",
    paper="Pan et al., Mesa: A Memory-saving Training Framework for Transformers, arXiv 2111.11124",
    takes=("image", "vector", "tokens", "series", "points"),
    sends="weights",
)
class Mesa(Trainer):
    """Mesa: every forward operation is exact, and what it saves for the backward pass is quantised (section 3).

    A saved activation is split into groups (heads in attention, pieces of the channels elsewhere), each with a running
    range and minimum: alpha <- 0.9 alpha + 0.1 (max - min), beta likewise, updated before use. Codes of ``bits`` bits
    are rounded stochastically, so the gradient of a weight is right in expectation where nothing is clipped. ReLU keeps
    one bit a value and loses nothing. Means and deviations of normalisations stay exact, weights are never copied.

    The paper replaces layers by rewritten ones with their own backward pass; here autograd's own saved tensors are
    compressed as they are saved (``torch.autograd.graph.saved_tensors_hooks``), so any model of the listed layers will
    do. Values above the running range are clipped, as the paper says (the authors' kernel lets them wrap around).

    Weights travel as usual. Ranges are the client's own: they describe its data, live in its state across rounds and
    are never averaged. Metrics of every turn, counted in its first step: ``saved-bytes``, what that step saved for the
    backward pass beside parameters and batch, ``exact-bytes``, what it would have saved, and ``saved-share``, their
    ratio. Nothing else holds an activation: the memory that is really alive is the count's (``_memory.bytes_alive``).
    Time is not saved but spent: a step of the small transformer in the bundled scenario takes twice as long.
    """

    class Config(TrainerConfig):
        bits: Literal[2, 4, 8, 32] = Field(8, description="of a saved value; 32 is the baseline: exact, and counted")
        groups: Annotated[int, Field(ge=1)] = Field(
            4,
            description="groups of channels, each with its own range, outside of attention; where they do not divide "
            "the channels, as many as the greatest common divisor",
        )
        decay: Annotated[float, Field(ge=0, lt=1)] = Field(DECAY, description="of the running ranges")
        rounding: Literal["stochastic", "nearest"] = "stochastic"
        attention: Literal["explicit", "fused"] = Field(
            "explicit", description="of the model vit: with its matrix kept, as in the paper, or computed anew by torch"
        )

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task)
        # Of the turn at work. A replay of bare steps goes on with those of the turn before, at the same cost.
        self.compression: Compression | None = None
        self.counts: list[Count] = []

    def build(self) -> nn.Module:
        model = super().build()
        if self.config.attention == "explicit":
            for module in list(model.modules()):
                for name, child in module.named_children():
                    if isinstance(child, vit.Attention):
                        setattr(module, name, Attention(child))
        cover(model, COVERED, lambda: self.compression)
        return model

    def fit(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        c, self.counts = self.config, []
        own = [*model.parameters(), *model.buffers()]
        ranges = {name: [Range(**span) for span in spans] for name, spans in state.get(RANGES, {}).items()}
        self.compression = Compression(c.bits, c.groups, c.rounding == "stochastic", c.decay, ranges, own)
        metrics: dict[str, Any] = super().fit(model, data, state, turn)
        state[RANGES] = {name: [dict(vars(span)) for span in spans] for name, spans in ranges.items()}
        for count in self.counts:
            metrics |= {"saved-bytes": count.kept, "exact-bytes": count.exact}
            metrics["saved-share"] = count.kept / max(count.exact, 1)
        return metrics

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:
        if self.compression is None or self.counts:
            return super().loss(model, batch, turn)
        with self.compression.counting(batch.fields.values()) as count:
            self.counts.append(count)
            return super().loss(model, batch, turn)
