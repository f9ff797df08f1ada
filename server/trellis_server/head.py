"""A classifier's head in the cloud: where it stands among the shared arrays, how good it is, and training it alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from trellis import records
from trellis.data.base import Federation, Split
from trellis.errors import ScenarioError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BATCH = 256


class Site(Protocol):
    """The cloud's use of the trainer, as far as a head needs it: ``bench.site`` of a strategy's ``attach``."""

    model: nn.Module
    trainer: Any
    federation: Federation
    device: torch.device

    def load(self, arrays: Mapping[str, Tensor], state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Head:
    """A model's linear head. ``weight`` and ``bias`` are its names among the shared arrays (no bias: empty)."""

    site: Site
    weight: str
    bias: str
    features: int
    classes: int

    @classmethod
    def of(cls, site: Site, asker: str) -> Head:
        """Find the head of a site's model.

        Args:
            site: the cloud's use of the trainer.
            asker: the strategy that needs it, for messages.

        Raises:
            ScenarioError: the model has no ``features(x)`` and linear ``head``; the head is not shared; or clients
                keep other parts of the model to themselves, so that features differ from client to client.
        """
        from torch import nn

        model: Any = site.model
        head = getattr(model, "head", None)
        if not callable(getattr(model, "features", None)) or not isinstance(head, nn.Linear):
            raise ScenarioError(
                "scenario-pairing",
                f"strategy {asker!r} needs a model with features(x) and a linear head; {type(model).__name__} has none",
            )
        shared: Mapping[str, Tensor] = site.trainer.shared(model)
        at = {values.data_ptr(): name for name, values in shared.items()}
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        for name, values in model.state_dict().items():
            if values.is_floating_point() and values.data_ptr() not in at and name not in frozen:
                raise ScenarioError(
                    "scenario-pairing",
                    f"strategy {asker!r} needs one feature extractor for all clients, but they keep {name!r} to "
                    "themselves (trainer.batch_norm: only 'average' shares all of it)",
                )
        bias = "" if head.bias is None else at[head.bias.data_ptr()]
        return cls(site, at[head.weight.data_ptr()], bias, head.in_features, head.out_features)

    def parameters(self, arrays: ArrayRecord) -> list[Tensor]:
        """Return copies of weight and bias (if any) as tensors."""
        import torch

        return [torch.from_numpy(arrays[name].numpy()).to(self.site.device) for name in self.names]

    @property
    def names(self) -> list[str]:
        return [self.weight, *([self.bias] if self.bias else [])]

    def features_of(self, arrays: ArrayRecord, split: Split) -> tuple[Tensor, Tensor]:
        """Return features and labels of a split under the given model, in evaluation mode."""
        import torch

        received = {name: torch.from_numpy(a.numpy()).to(self.site.device) for name, a in arrays.items()}
        self.site.load(received, {})
        model: Any = self.site.model.eval()
        with torch.no_grad():
            order, starts = torch.arange(len(split), device=split.rows.device), range(0, len(split), BATCH)
            batches = [split.batch(order[start : start + BATCH]) for start in starts]
            return torch.cat([model.features(batch.x) for batch in batches]), torch.cat([b.y for b in batches])

    def replaced(self, arrays: ArrayRecord, parameters: list[Tensor]) -> ArrayRecord:
        """Return the model with another head; all other arrays are the very same."""
        new = {name: values.cpu().numpy() for name, values in zip(self.names, parameters, strict=True)}
        result = ArrayRecord()
        for name, array in arrays.items():
            result[name] = records.LiveArray(new[name]) if name in new else array
        return result


@dataclass(frozen=True)
class Training:
    """SGD on the head: ``epochs`` passes over the features in mini-batches of a seeded order."""

    epochs: int
    lr: float
    momentum: float
    batch_size: int
    weight_decay: float = 0.0


def retrain(
    parameters: list[Tensor],
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    training: Training,
    generator: torch.Generator,
) -> list[Tensor]:
    """Train a linear head on features alone, from where it stands.

    Only the classes among the labels take part: the others' rows stay as they are to the bit, and their logits are
    left out of the softmax, or it would push them down for every example that they have not.

    Args:
        parameters: weight ``(classes, D)`` and perhaps bias ``(classes,)``; not changed.
        features: ``(n, D)``.
        labels: ``(n,)``.
        training: how.
        generator: of the order, on the CPU.

    Returns:
        New parameters.
    """
    import torch
    from torch.nn import functional as F

    device, dtype = parameters[0].device, parameters[0].dtype
    classes, targets = np.unique(labels, return_inverse=True)
    rows = torch.from_numpy(classes).to(device)
    z = torch.from_numpy(features).to(device, dtype)
    y = torch.from_numpy(targets.astype(np.int64)).to(device)
    trained = [values[rows].clone().requires_grad_() for values in parameters]
    optimizer = torch.optim.SGD(trained, lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay)
    for _ in range(training.epochs):
        order = torch.randperm(len(y), generator=generator).to(device)
        for start in range(0, len(y), training.batch_size):
            index = order[start : start + training.batch_size]
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(F.linear(z[index], *trained), y[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    result = [values.clone() for values in parameters]
    for values, new in zip(result, trained, strict=True):
        values[rows] = new.detach()
    return result


def accuracy_by_class(parameters: list[Tensor], features: Tensor, labels: Tensor) -> tuple[float, dict[int, float]]:
    """Return a head's accuracy on features, over all and for every class among the labels."""
    import torch
    from torch.nn import functional as F

    right = (F.linear(features, *parameters).argmax(1) == labels).double()
    classes: list[int] = torch.bincount(labels).nonzero().flatten().tolist()
    return float(right.mean()), {label: float(right[labels == label].mean()) for label in classes}
