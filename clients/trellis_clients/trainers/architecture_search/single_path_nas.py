"""Single-Path NAS: kernel sizes, widths and depth are learnt as thresholds on parts of one kernel a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.data.base import Batch, Split
from trellis.errors import listed
from trellis.models._base import image_shape
from trellis.registry import register
from trellis_clients.trainer import Metrics, NonNegative, Task, Trainer, TrainerConfig, Turn
from trellis_clients.trainers.architecture_search._superkernel import OPTIONS, Decisions, Network, Place, latency

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Group = Annotated[tuple[Count, ...], Field(min_length=3, max_length=3)]
Row = Annotated[tuple[Positive, ...], Field(min_length=4, max_length=4)]
Option = Literal["skip", "3x3-e3", "3x3-e6", "5x5-e3", "5x5-e6"]
Table = Annotated[tuple[Row, ...], Field(min_length=1)]


@register(
    "trainers",
    "single-path-nas",
    summary="architecture search by thresholds on parts of one kernel a layer",
    paper="Stamoulis et al., Single-Path NAS: Designing Hardware-Efficient ConvNets in less than 4 Hours,"
    " ECML-PKDD 2019",
    takes=("image",),
    sends="weights",
)
class SinglePathNas(Trainer):
    """Single-Path NAS: all candidates of a layer lie in one 5x5 depthwise kernel (superkernel.py of the authors' code).

    A layer uses the kernel's outer ring, its second half of channels, or any of it at all, if the norm of that part is
    at least a learnt threshold: 5x5 or 3x3, expansion 6 or 3, or skipped. The step passes the gradient of a sigmoid, so
    weights and thresholds learn together, from cross-entropy plus ``latency_weight`` times the logarithm of the
    predicted latency. In the warm-up (``warm_up`` of the planned rounds) latency does not count and decisions are
    dropped at random, so that the small kernels learn too.

    Latency is a sum over layers from a table of four values each. Without ``tables`` they are thousands of
    multiply-accumulates, and those of stem and head are added; a device's own measurements go there in any unit. 3x3
    at expansion 3 is predicted from the other three, as in the authors' code. Averaging may flip a decision:
    ``latency``, ``skipped`` and ``layer-<n>`` (0 to 4: skip, 3x3-e3, 3x3-e6, 5x5-e3, 5x5-e6) are read off the model at
    hand, in the cloud off the averaged one. ``architecture`` trains a found network from scratch under the same keys.

    In a federation kernels and thresholds are averaged. With ``thresholds: local`` every client keeps its own
    (``kept``), and client n looks at table n modulo their number: personal networks in one kernel. The cloud then has
    no network to speak of and reports none. Adam starts anew every turn; the warm-up counts rounds, so it is the same
    after a restart.

    What differs: few layers for small images, no fixed blocks and no 1x1 convolution before the pooling, no label
    smoothing, dropout or average of weights; Adam instead of RMSProp, with a rate of its own for thresholds, and the
    latency's weight without the authors' 1000. Superkernels start at a deviation of 0.05 (theirs at the root of 2 over
    25 times the channels), so that their norms lie within reach of thresholds that move for a few hundred steps.
    Weight decay goes through Adam and is on every parameter; theirs is in the loss, on thresholds too, but not on batch
    norm. Norms are not squared, as in their code; the paper's are.
    """

    class Config(TrainerConfig):
        lr: Positive = Field(2e-3, description="of Adam")
        threshold_lr: Positive = 0.05
        momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of Adam, its first beta")
        weight_decay: NonNegative = 1e-5
        batch_size: Count = 64
        drop_last: bool = True
        stem: Count = Field(8, description="channels of the first convolution")
        groups: Annotated[tuple[Group, ...], Field(min_length=1)] = Field(
            ((12, 3, 1), (16, 3, 2)), description="width, layers and first stride of each group"
        )
        latency_weight: NonNegative = Field(0.2, description="lambda; 0 searches for accuracy alone")
        warm_up: Annotated[float, Field(ge=0, lt=1)] = Field(0.6, description="share of the planned rounds")
        keep: Annotated[float, Field(gt=0, le=1)] = Field(0.6, description="share of decisions kept in the warm-up")
        tables: Annotated[tuple[Table, ...], Field(min_length=1)] | None = Field(
            None,
            description="latencies of devices: for each, a row a layer of 3x3-e3, 3x3-e6, 5x5-e3, 5x5-e6;"
            " multiply-accumulates if not given",
        )
        fixed_latency: NonNegative | None = Field(
            None,
            description="of stem and head, in the unit of the tables; not given, it is 0 beside tables, else counted",
        )
        thresholds: Literal["shared", "local"] = Field("shared", validate_default=True)
        architecture: tuple[Option, ...] | None = Field(
            None, description="train this network, an option a layer, instead of searching"
        )

        @field_validator("tables")
        @classmethod
        def rows(cls, tables: tuple[Table, ...] | None, info: ValidationInfo) -> tuple[Table, ...] | None:
            layers = layers_of(info)
            for number, table in enumerate(tables or ()):
                if layers is not None and len(table) != layers:
                    raise ValueError(
                        f"table {number} has {len(table)} rows; it needs {layers}, one for each layer of trainer.groups"
                    )
            return tables

        @field_validator("thresholds")
        @classmethod
        def devices(cls, thresholds: str, info: ValidationInfo) -> str:
            count = len(info.data.get("tables") or ())
            if thresholds == "shared" and count > 1:
                raise ValueError(
                    f"trainer.tables has {count} tables; shared thresholds are one network and need one table, so take"
                    " 'local' or leave one table"
                )
            return thresholds

        @field_validator("architecture")
        @classmethod
        def options(cls, found: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
            layers = layers_of(info)
            if found is None or layers is None or "stem" not in info.data:
                return found
            if len(found) != layers:
                raise ValueError(f"{len(found)} options; it needs {layers}, one for each layer of trainer.groups")
            for number, place in enumerate(places((1, 1), info.data["stem"], info.data["groups"])):
                if found[number] == "skip" and not place.skippable:
                    raise ValueError(
                        f"layer {number} is 'skip' and changes the shape; allowed are {listed(OPTIONS[1:])}"
                    )
            return found

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task)
        channels, *size = image_shape(task.shape, "single-path-nas", 8)
        self.channels, self.places = channels, places((size[0], size[1]), config.stem, config.groups)
        self.tables = config.tables or (counted(self.places),)
        self.fixed = 0.0 if config.tables else around(self.places, channels, task.num_classes)
        if config.fixed_latency is not None:
            self.fixed = config.fixed_latency

    def build(self) -> Network:
        return Network(self.channels, self.task.num_classes, self.places, self.config.architecture)

    def kept(self, model: nn.Module) -> set[str]:
        own = {name for name in model.state_dict() if name.endswith(".thresholds")}
        return super().kept(model) | (own if self.config.thresholds == "local" else set())

    # -- the search -----------------------------------------------------------------------------------

    def warming(self, turn: Turn) -> bool:
        """Whether latency does not count yet."""
        share: float = self.config.warm_up
        return turn.progress < share

    def optimizer(self, model: nn.Module, turn: Turn) -> torch.optim.Optimizer:  # noqa: ARG002
        c = self.config
        parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in model.named_parameters():
            parts[name.endswith(".thresholds")].append(parameter)
        groups = [{"params": parts[True], "lr": c.threshold_lr}, {"params": parts[False], "lr": c.lr}]
        used = [group for group in groups if group["params"]]
        return torch.optim.Adam(used, lr=c.lr, betas=(c.momentum, 0.999), weight_decay=c.weight_decay)

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:
        assert isinstance(model, Network)
        c, warming = self.config, self.warming(turn)
        logits, decided = model.run(batch.x, c.keep if warming else 1.0)
        loss = F.cross_entropy(logits, batch.y)
        if warming or not decided or not c.latency_weight:
            return loss
        return loss + float(c.latency_weight) * self.total(decided, turn.client).log()

    def total(self, decided: list[Decisions], client: int) -> Tensor:
        """Return the latency of a network on a client's device; in the cloud (-1), on the first device."""
        table = self.tables[max(client, 0) % len(self.tables)]
        rows = [latency(decisions, row) for decisions, row in zip(decided, table, strict=True)]
        return torch.stack(rows).sum() + self.fixed

    # -- use ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def found(self, model: nn.Module) -> list[Decisions]:
        """Return what the weights as they are decide, a layer each; of a found network, what it was built from."""
        assert isinstance(model, Network)
        if self.config.architecture is None:
            return [layer.kernel()[1] for layer in model.layers]  # type: ignore[operator]
        return [decisions_of(option) for option in self.config.architecture]

    def evaluate(self, model: nn.Module, split: Split, turn: Turn, batch_size: int = 256) -> Metrics:
        """Return loss, accuracy, and the network at hand: ``latency``, layers ``skipped``, and each layer's option.

        In the cloud, under ``thresholds: local``, loss and accuracy only: nobody uses the thresholds that lie there.
        """
        metrics = super().evaluate(model, split, turn, batch_size)
        if turn.client < 0 and self.config.thresholds == "local":
            return metrics
        decided = self.found(model)
        options = [OPTIONS.index(decisions.option()) for decisions in decided]
        metrics |= {"latency": float(self.total(decided, turn.client)), "skipped": options.count(0)}
        if turn.client < 0:  # an average over clients of option numbers would mean nothing
            metrics |= {f"layer-{number}": option for number, option in enumerate(options)}
        return metrics


def layers_of(info: ValidationInfo) -> int | None:
    """Return how many layers a config's groups make; None where the groups themselves are wrong."""
    groups = info.data.get("groups")
    return None if groups is None else sum(layers for _, layers, _ in groups)


def places(size: tuple[int, int], inputs: int, groups: tuple[tuple[int, ...], ...]) -> list[Place]:
    """Return where the searchable layers stand; the first of a group has its stride and changes the width."""
    result = []
    for width, layers, stride in groups:
        for number in range(layers):
            place = Place(inputs, width, stride if number == 0 else 1, size)
            result.append(place)
            inputs, size = width, place.size_after
    return result


def counted(layers: Sequence[Place]) -> tuple[tuple[float, ...], ...]:
    """Return a table of thousands of multiply-accumulates: a row a layer of 3x3-e3, 3x3-e6, 5x5-e3, 5x5-e6."""
    return tuple(tuple(p.macs(kernel, expansion) for kernel in (3, 5) for expansion in (3, 6)) for p in layers)


def around(layers: Sequence[Place], channels: int, classes: int) -> float:
    """Return thousands of multiply-accumulates of stem and head."""
    first, last = layers[0], layers[-1]
    return (math.prod(first.size) * channels * first.inputs * 9 + last.outputs * classes) / 1000


def decisions_of(option: str) -> Decisions:
    """Return the indicators that stand for an operation; the reverse of ``Decisions.option``."""
    bits = (option.startswith("5x5"), option != "skip", option.endswith("e6"))
    return Decisions(*(torch.tensor(float(bit)) for bit in bits))
