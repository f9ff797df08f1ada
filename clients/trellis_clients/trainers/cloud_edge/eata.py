"""EATA: entropy minimisation on the device, on reliable and non-redundant samples, held near the source."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trellis.data.base import ClientData
from trellis.models import adaptation
from trellis.registry import register
from trellis_clients import batchnorm
from trellis_clients.trainer import State, Turn, in_order
from trellis_clients.trainers.cloud_edge._on_device import OnDeviceConfig, OnDeviceTrainer

MEAN = "mean"
FISHER = "fisher"
ANCHOR = "anchor"


@register(
    "trainers",
    "eata",
    summary="EATA: entropy minimisation on the device, on selected samples, with a Fisher penalty",
    paper="arXiv 2204.02610",
    takes=("image",),
    sends="uploads",
    payload="metrics alone",
    replies=("uploads",),
)
class Eata(OnDeviceTrainer):
    """Niu et al., "Efficient Test-Time Model Adaptation without Forgetting", ICML 2022.

    The Fisher diagonal is computed once, on the client's own clean training examples without their labels.
    """

    class Config(OnDeviceConfig):
        e_max: float = Field(0.4, ge=0, description="E0: unreliable from here on, in units of ln C")
        max_cosine: float = Field(0.4, ge=0, description="redundant from here on; 0.05 for 1000 classes")
        fisher_weight: float = Field(1.0, ge=0, description="beta; 2000 in the paper's ImageNet runs")
        fisher_images: int = Field(200, ge=0, description="images that the Fisher diagonal is computed on")

    def prepare(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> None:
        """Compute Fisher diagonal and anchor from the source model, before its first batch."""
        c = self.config
        if FISHER in state or not c.fisher_weight:
            return
        own = adaptation.affine(model)
        # Drawn: of examples stored class by class the first are of one class, and so would a batch's statistics be.
        drawn = torch.randperm(len(data.train), generator=turn.generator)[: c.fisher_images]
        images = data.train.subset(drawn.to(data.train.rows.device))
        squares = {name: torch.zeros_like(values) for name, values in own.items()}
        model.eval()
        batches = list(in_order(images, c.stream.batch_size))
        for batch in batches:
            with batchnorm.batch_statistics(model):
                logits = model(batch.x)
            gradients = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), list(own.values()))
            for name, gradient in zip(own, gradients, strict=True):
                squares[name] += gradient**2 / len(batches)
        state[FISHER] = squares
        state[ANCHOR] = {name: values.detach().clone() for name, values in own.items()}

    def objective(self, model: nn.Module, logits: Tensor, state: State) -> tuple[Tensor | None, int]:
        """Return the weighted entropy of the samples kept, plus the penalty; None if none is kept."""
        c = self.config
        e0 = c.e_max * math.log(self.task.num_classes)
        entropies = adaptation.entropy(logits)
        kept = (entropies.detach() < e0).nonzero()[:, 0]
        probabilities = logits.detach().softmax(1)
        if MEAN in state:
            cosine = F.cosine_similarity(state[MEAN][None], probabilities[kept], dim=1)
            kept = kept[cosine.abs() < c.max_cosine]
        if not len(kept):
            return None, 0
        mean = probabilities[kept].mean(0)
        state[MEAN] = 0.9 * state[MEAN] + 0.1 * mean if MEAN in state else mean
        chosen = entropies[kept]
        loss = ((e0 - chosen.detach()).exp() * chosen).mean()
        if FISHER in state:
            for name, values in adaptation.affine(model).items():
                loss = loss + c.fisher_weight * (state[FISHER][name] * (values - state[ANCHOR][name]) ** 2).sum()
        return loss, len(kept)
