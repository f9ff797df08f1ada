"""What every device of the cloud-edge family does: answer its stream with the model it has, and count.

The strategy asks ``train.stream``: go on for K batches with these affine parameters. The device answers each batch
once, and that answer counts. How it answers, and what it keeps, changes or uploads, is its ``adapt``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trellis.data.base import Batch, ClientData
from trellis.data.streams import Stream, StreamConfig
from trellis.errors import DataError
from trellis.models import adaptation
from trellis_clients.trainer import Metrics, State, Task, Trainer, TrainerConfig, Turn

SOURCE = "source"
"""Record of the first message to a client, and key of its state: the whole source model."""

UPLOADS = "uploads"
"""Record of a reply: ``images`` of shape ``(n, channels, height, width)``, pixels as uint8 or float32 in [0, 1]."""

POSITION = "position"


class EdgeConfig(TrainerConfig):
    """Shared by the family. The optimiser's fields matter only to those that adapt on the device."""

    stream: StreamConfig = StreamConfig()
    upload: Literal["uint8", "float32"] = Field("uint8", description="how pixels cross the wire")


@dataclass
class Work:
    """What a device did in a turn, in samples, for the tables."""

    forwards: int = 0
    backwards: int = 0
    uploads: list[Tensor] = field(default_factory=list)
    extra: Metrics = field(default_factory=dict)


class EdgeTrainer(Trainer):
    """A device with a frozen source model of which only the normalisation layers' affine parameters change.

    Subclasses override ``adapt``. ``fit``, which no strategy of this family asks for, is supervised training of the
    same parameters.
    """

    class Config(EdgeConfig):
        """Nothing beyond the family's."""

    def __init__(self, config: Any, task: Task) -> None:
        super().__init__(config, task)
        self.source: dict[str, Tensor] | None = None  # the cloud puts its own here, to judge it by ``evaluate``
        self.work = Work()

    def build(self) -> nn.Module:
        """Return the scenario's model with everything frozen but the affine parameters.

        Raises:
            DataError: it has no normalisation layers.
        """
        model = adaptation.train_only_affine(super().build())
        if not adaptation.affine(model):
            raise DataError(
                "edge-no-norm", "the model has no normalisation layers to adapt; choose one, e.g. model.norm=batch"
            )
        return model

    def prepare(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> None:
        """Do what must be done once per turn before the stream goes on; by default nothing."""

    def shared(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what crosses the wire: scale and shift of the normalisation layers."""
        return adaptation.affine(model)

    def load_shared(self, model: nn.Module, arrays: Mapping[str, Tensor]) -> None:
        """Make the model the source model with the received affine parameters."""
        if self.source is not None:
            model.load_state_dict(self.source)
        super().load_shared(model, arrays)

    def stream(self, data: ClientData) -> Stream:
        """Return the client's stream, which is its test split under the scenario's corruptions."""
        mean, std = (tuple(self.task.facts.get(key, (default,))) for key, default in (("mean", 0.0), ("std", 1.0)))
        return Stream(self.config.stream, data.test, mean, std, self.task.seed, data.client)

    def answer(self, action: str, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        """Answer ``train.stream``: K batches of the stream. Other questions go to the base class."""
        if action != "stream":
            return super().answer(action, model, data, state, turn)
        self._deploy(model, state, turn)
        stream, position = self.stream(data), int(state.get(POSITION, 0))
        batches = [stream.batch(position + k) for k in range(int(turn.config["batches"]))]
        self.prepare(model, data, state, turn)
        self.work = Work()
        right = seen = 0
        surprise = 0.0
        unlabeled = (Batch({"x": x}, torch.arange(len(x))) for x, _ in batches)
        for logits, (_, labels) in zip(self.adapt(model, unlabeled, state, turn), batches, strict=True):
            right += int((logits.argmax(1) == labels).sum())
            surprise += float(adaptation.entropy(logits).sum())
            seen += len(labels)
        state[POSITION] = position + len(batches)
        images = self._encoded(stream)
        turn.reply[UPLOADS] = {"images": images}
        return {
            "seen": seen,
            "right": right,
            "accuracy": right / seen,
            "entropy": surprise / seen,
            "uploaded": len(images),
            "upload-bytes": images.numel() * images.element_size(),
            "forwards": self.work.forwards,
            "backwards": self.work.backwards,
            **self.work.extra,
        }

    def _deploy(self, model: nn.Module, state: State, turn: Turn) -> None:
        """Take in the source model where it came along, and load it with the received affine parameters."""
        if SOURCE in turn.received:
            state[SOURCE] = {name: values.clone() for name, values in turn.received[SOURCE].items()}
        if SOURCE not in state:
            raise DataError("edge-no-source", f"client {turn.client} was never sent the source model")
        with torch.no_grad():
            live = model.state_dict()
            for name, values in {**state[SOURCE], **turn.received["arrays"]}.items():
                live[name].copy_(values)

    def _encoded(self, stream: Stream) -> Tensor:
        inputs = torch.cat([torch.empty(0, *self.task.shape, device=self.task.device), *self.work.uploads])
        pixels = stream.to_pixels(inputs)
        return (pixels * 255).round().to(torch.uint8) if self.config.upload == "uint8" else pixels


@contextmanager
def moving_statistics(model: nn.Module, rate: float, started: bool = True) -> Iterator[None]:
    """Move the batch-norm layers' running statistics towards each batch's own before they are used.

    ``running += rate * (batch - running)``, both biased. With rate 1 this is prediction-time batch norm, with 0 the
    source's statistics. ``started`` False takes the first batch's as they are.
    """
    seen: set[nn.Module] = set()

    def move(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        x = inputs[0]
        over = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x, over, correction=0)
        share = rate if started or layer in seen else 1.0
        seen.add(layer)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.lerp_(mean, share)
        layer.running_var.lerp_(var, share)

    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    hooks = [layer.register_forward_pre_hook(move) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
