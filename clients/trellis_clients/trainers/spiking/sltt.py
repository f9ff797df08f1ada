"""SLTT: spiking networks without gradients through time, one backward pass a time step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.data.base import Batch
from trellis.errors import ScenarioError
from trellis.models import spiking
from trellis.models.zoo.spiking_cnn import SpikingClassifier
from trellis.registry import register
from trellis_clients.trainer import NonNegative, Trainer, TrainerConfig, Turn


@register(
    "trainers",
    "sltt",
    summary="spatial learning through time: spiking networks, one backward pass a time step",
    paper="Meng et al., Towards Memory- and Time-Efficient Backpropagation for Training Spiking Neural Networks,"
    " ICCV 2023",
    takes=("events", "image"),
    sends="weights",
)
class Sltt(Trainer):
    """SLTT: the gradient of a spiking network is cut between time steps (neuron.py and train_SLTT.py of the authors).

    Back-propagation through time (``gradient: bptt``, the baseline) holds the graph of all T steps. SLTT cuts the
    gradient between steps: the potential that a neuron brings along from the step before is detached, the forward pass
    is as it was. Then each step's loss can be sent back at once and its graph let go, so that memory does not grow with
    T; the optimizer steps once, after the last. A step's loss is [(1 - mse) CE(out, y) + mse MSE(out, 1)] / T, and
    predictions are of the mean output. SLTT-K (``steps``, train_SLTTK.py) draws K of the T steps for each batch and
    sends back those alone; the others run forward without a graph. Over all draws, at the weights and potentials of one
    batch, the mean of its gradients is K/T of SLTT's; SLTT's own is not that of the loss.

    In a federation weights and batch-norm layers travel. Potentials belong to a batch: they are reset before each, are
    no part of the model, and nothing of them is kept or sent. Batch norm sees single steps, and its running statistics
    mix quiet early steps with late ones, client by client; ``batch_norm: local`` keeps the layers at home. In a
    scenario all clients share T and K. If they did not, 1/T in the loss would keep gradients of different T on one
    scale, and ``rescale`` (T/K, not in the authors' code) those of different K.

    What differs: no dropout, mixed precision or augmentation (theirs are 0.3 and 0.4 on event data); the cosine
    schedule is over rounds, and momentum starts at zero in every turn; the MSE is the regulariser towards 1, their
    variant towards one-hot labels (for DVS-CIFAR10) is left out; the ``loss`` of an evaluation is the cross-entropy of
    the mean output, not the mean of the steps' losses. The networks are small; ImageNet's normaliser-free one is not
    here.
    """

    class Config(TrainerConfig):
        lr: Annotated[float, Field(gt=0)] = Field(0.1, description="0.05 to 0.1 in the paper; small networks bear more")
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
        weight_decay: NonNegative = 5e-5
        batch_size: Annotated[int, Field(ge=1)] = 64
        gradient: Literal["sltt", "bptt"] = "sltt"
        steps: Annotated[int, Field(ge=1)] | None = Field(None, description="K, time steps sent back; all if not given")
        rescale: bool = Field(False, description="weigh the K steps by T / K; for gradient 'sltt'")
        mse: Annotated[float, Field(ge=0, le=1)] = Field(0.05, description="share of the regulariser in the loss")
        cosine: bool = Field(True, description="learning rate to zero over the rounds, as half a cosine")

        @field_validator("steps", "rescale")
        @classmethod
        def of_single_steps(cls, value: int | bool | None, info: ValidationInfo) -> int | bool | None:
            if value and info.data.get("gradient") == "bptt":
                raise ValueError("for gradient 'sltt' only; under 'bptt' every step is part of one graph")
            return value

    config: Config

    def build(self) -> SpikingClassifier:
        model = self.task.model()
        if not isinstance(model, SpikingClassifier):
            raise ScenarioError(
                "sltt-model", f"trainer 'sltt' needs a spiking model, e.g. spiking-cnn; this is {type(model).__name__}"
            )
        return model

    def optimizer(self, model: nn.Module, turn: Turn) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model, turn)
        if self.config.cosine:
            for group in optimizer.param_groups:
                group["lr"] *= (1 + math.cos(math.pi * turn.progress)) / 2
        return optimizer

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:  # noqa: ARG002
        """Return the loss of all steps with its whole graph, through time or not as ``gradient`` says."""
        assert isinstance(model, SpikingClassifier)
        spiking.reset(model)
        spiking.through_time(model, self.config.gradient == "bptt")
        outputs = [model.step(frame) for frame in model.frames(batch.x)]
        spiking.reset(model)
        return torch.stack([self.part(output, batch.y) for output in outputs]).mean()

    def part(self, output: Tensor, y: Tensor) -> Tensor:
        """Return one step's loss, not yet divided by the number of steps."""
        mse = self.config.mse
        return (1 - mse) * F.cross_entropy(output, y) + mse * (output - 1).square().mean()

    def backward(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:
        """Send each step's loss back as it comes; return the loss of all steps."""
        if self.config.gradient == "bptt":
            return super().backward(model, batch, turn)
        assert isinstance(model, SpikingClassifier)
        spiking.reset(model)
        spiking.through_time(model, False)
        frames, total = list(model.frames(batch.x)), torch.zeros((), device=batch.x.device)
        chosen = self.chosen(len(frames), turn)
        weight = (len(frames) / len(chosen) if self.config.rescale else 1.0) / len(frames)
        for number, frame in enumerate(frames):
            with torch.set_grad_enabled(number in chosen):
                part = self.part(model.step(frame), batch.y)
            if number in chosen:
                (weight * part).backward()  # type: ignore[no-untyped-call]
            total += part.detach() / len(frames)
        spiking.reset(model)
        return total

    def chosen(self, count: int, turn: Turn) -> set[int]:
        """Return which of the steps are sent back."""
        steps = self.config.steps
        if steps is None or steps >= count:
            return set(range(count))
        return set(torch.randperm(count, generator=turn.generator)[:steps].tolist())
