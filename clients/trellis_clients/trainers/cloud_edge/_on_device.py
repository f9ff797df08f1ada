"""Test-time adaptation by gradients on the device itself, one step per batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

from trellis.data.base import Batch
from trellis.models import adaptation
from trellis_clients import batchnorm
from trellis_clients.trainer import State, Turn
from trellis_clients.trainers.cloud_edge._edge import EdgeConfig, EdgeTrainer

AFFINE = "affine"
OPTIMIZER = "optimizer"


class OnDeviceConfig(EdgeConfig):
    """The optimiser of EATA's small-scale settings."""

    lr: float = Field(0.005, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)


class OnDeviceTrainer(EdgeTrainer):
    """Batch statistics always; the step after an answer helps later batches only. Nothing is uploaded."""

    class Config(OnDeviceConfig):
        """Nothing beyond the optimiser."""

    @abstractmethod
    def objective(self, model: nn.Module, logits: Tensor, state: State) -> tuple[Tensor | None, int]:
        """Return the loss of a batch and how many samples it is of, or None if there is to be no step."""

    def adapt(self, model: nn.Module, stream: Iterable[Batch], state: State, turn: Turn) -> Iterator[Tensor]:
        """Answer each batch, then take a step on it. Parameters and momentum live in the client's state."""
        own = adaptation.affine(model)
        with torch.no_grad():
            for name, values in state.get(AFFINE, {}).items():
                own[name].copy_(values)
        optimizer = self.optimizer(model, turn)
        if OPTIMIZER in state:
            optimizer.load_state_dict(state[OPTIMIZER])
        model.eval()  # no dropout; the statistics are the batch's own
        for batch in stream:
            with batchnorm.batch_statistics(model):
                logits = model(batch.x)
            self.work.forwards += len(batch)
            yield logits.detach()
            loss, used = self.objective(model, logits, state)
            if loss is not None:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                self.work.backwards += used
        state[AFFINE] = {name: values.detach().clone() for name, values in own.items()}
        state[OPTIMIZER] = optimizer.state_dict()
