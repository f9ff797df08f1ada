"""Models to start from: trained on clean labelled data, or read from a safetensors file."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from trellis import seeding
from trellis.data.base import Split
from trellis.errors import DataError


def train(
    model: nn.Module,
    data: Split,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    name: str,
    smoothing: float = 0.0,
) -> None:
    """Train a classifier on labelled data with Adam and a cosine schedule, every parameter of it.

    Args:
        model: changed in place, left in evaluation mode.
        data: clean examples with labels.
        seed: with ``name`` it decides the order of the examples.
        name: of the model, so that two of one run see different orders.
        smoothing: share of a label that is spread over all classes.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps = max(epochs * (len(data) // batch_size), 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with seeding.scoped(seed, "pretraining", name):  # dropout, where a model has it
        for epoch in range(epochs):
            order = torch.randperm(len(data), generator=seeding.torch_generator(seed, "pretraining", name, epoch))
            for index in torch.split(order.to(data.rows.device), batch_size):
                if len(index) < batch_size and len(data) >= batch_size:
                    continue  # statistics of a handful of images would be poor
                batch = data.batch(index)
                loss = F.cross_entropy(model(batch.x), batch.y, label_smoothing=smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    model.eval()


def read(model: nn.Module, path: Path, key: str, leaving_out: tuple[str, ...] = ()) -> None:
    """Load a safetensors file of the model's own state dict, less the names that begin with one of ``leaving_out``.

    Raises:
        DataError: the file is missing, unreadable, or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise DataError("weights-missing", f"{key}: nothing is at {path}")
    try:
        weights = load_file(path)
        model.load_state_dict({name: v for name, v in weights.items() if not name.startswith(leaving_out)})
    except (SafetensorError, OSError) as error:
        raise DataError("weights-damaged", f"{key}: {path} is not readable as safetensors: {error}") from None
    except RuntimeError as error:
        reason = textwrap.shorten(str(error).partition("\n")[2] or str(error), 200)
        raise DataError("weights-shape", f"{key}: {path} does not fit the model: {reason}") from None
    model.eval()
