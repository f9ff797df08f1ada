"""The frozen base of a federation: from a file, or pretrained by every side alike on data that everybody has."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path

from pydantic import Field
from torch import Tensor, nn

from trellis import experiment, seeding
from trellis.data.base import Split
from trellis.errors import PluginError
from trellis.models import pretraining
from trellis.scenario import Strict
from trellis_clients.trainer import Task
from trellis_clients.trainers.tuning._encoder import Encoder, encoder_of

STREAM = "base"
"""The data set's stream of labelled examples to pretrain on, and, with ``_classes`` behind it, the fact how many."""


class BaseConfig(Strict):
    """Where the frozen weights come from."""

    weights: str | None = Field(
        None, description="safetensors file of the model, from the working folder; its head is left out"
    )
    epochs: int = Field(
        30, ge=0, description="of pretraining on the data set's stream 'base'; 0 leaves the model as built"
    )
    lr: float = Field(1e-3, gt=0, description="of Adam in pretraining")
    batch_size: int = Field(64, ge=1)
    sent: bool = Field(
        False,
        description="the base is among the shared arrays; with strategy 'partial' it is sent to a client once. False: "
        "every side builds it alike",
    )


class _Whole(nn.Module):
    """The encoder under a head for pretraining."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x))
        return out


_TRAINED: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
_KEPT = 8
"""Bases kept per process: variants of a scenario start from the same one, under each of its seeds."""


def frozen_base(task: Task, config: BaseConfig) -> Encoder:
    """Return the scenario's model without head, with the weights that the config names, frozen, in evaluation mode.

    Pretraining runs on one thread, whatever the process has, and draws from generators of its own: every side comes to
    the same bits on machines of one kind. On others the last bits differ, for which there is ``sent``.

    Raises:
        PluginError: the model is no vision transformer, or there is nothing to pretrain it on.
        DataError: the file is missing or does not fit.
    """
    model = task.model()
    encoder = encoder_of(model).to(task.device)
    if config.weights is not None:
        pretraining.read(model, Path(config.weights), "trainer.base.weights", leaving_out=("head.",))
    if config.weights is None and config.epochs:
        data = task.splits.get(STREAM)
        if data is None:
            raise PluginError(
                "tuning-base",
                "the data set has no stream 'base' to pretrain on; take one that has (novel-digits), name a file in "
                "trainer.base.weights, or set trainer.base.epochs to 0",
            )
        _pretrain(encoder, data, task, config)
    return encoder.requires_grad_(False).eval()


def _pretrain(encoder: Encoder, data: Split, task: Task, config: BaseConfig) -> None:
    key = _key(encoder, data, task.seed, config)
    if key not in _TRAINED:
        with seeding.scoped(task.seed, "tuning", STREAM), experiment.torch_threads(1):
            whole = _Whole(encoder, int(task.facts[f"{STREAM}_classes"])).to(task.device)
            pretraining.train(
                whole,
                data,
                epochs=config.epochs,
                lr=config.lr,
                batch_size=config.batch_size,
                seed=task.seed,
                name=STREAM,
            )
        _TRAINED[key] = {name: values.detach().clone() for name, values in encoder.state_dict().items()}
        while len(_TRAINED) > _KEPT:
            _TRAINED.popitem(last=False)
    encoder.load_state_dict(_TRAINED[key])


def _key(encoder: Encoder, data: Split, seed: int, config: BaseConfig) -> str:
    """Return a digest of all that pretraining depends on."""
    digest = hashlib.blake2b(f"{seed} {config.epochs} {config.lr} {config.batch_size}".encode())
    for values in (*encoder.state_dict().values(), data.rows, *(data.fields[name] for name in ("x", "y"))):
        digest.update(values.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
