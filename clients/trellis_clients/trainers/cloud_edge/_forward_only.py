"""What trainers share that adapt by forward passes alone: an adapter of the edge runtime on a torch model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trellis.data.base import Batch, ClientData
from trellis.models import adaptation
from trellis_clients import batchnorm
from trellis_clients.edge import adapters
from trellis_clients.edge.adapters import Adapter
from trellis_clients.edge.predictor import Array, Prediction
from trellis_clients.torch_predictor import TorchPredictor
from trellis_clients.trainer import State, Turn
from trellis_clients.trainers.cloud_edge._edge import EdgeConfig, EdgeTrainer

ADAPTER = "adapter"
WEIGHTS = "weights"


class ForwardOnlyTrainer(EdgeTrainer):
    """A device that answers through an adapter. Nothing is uploaded, and no gradient is taken.

    The adapter's state is the client's: it lives across rounds and restarts and is never sent. It belongs to the
    weights it was made with; when the cloud sends others, it is dropped and the source's statistics are measured again.
    """

    adapter: ClassVar[str]
    """Name of the adapter; its options are fields of ``Config``."""

    source_examples: ClassVar[int] = 32
    """Clean examples of the client, without labels, that statistics of the source are measured on."""

    class Config(EdgeConfig):
        """With the adapter's options."""

    def build(self) -> nn.Module:
        """Return the family's model.

        Raises:
            DataError: it lacks what the adapter changes.
        """
        model = super().build()
        self.create(model, -1)
        return model

    def options(self, client: int) -> dict[str, Any]:  # noqa: ARG002
        """Return the adapter's options for a client."""
        own = adapters.named(self.adapter).Config.model_fields
        return {name: getattr(self.config, name) for name in own if name in type(self.config).model_fields}

    def create(self, model: nn.Module, client: int) -> Adapter:
        """Return a fresh adapter on the model."""
        predictor = StreamPredictor(model, self.task.classes, self.task.shape)
        return adapters.create(self.adapter, predictor, **self.options(client))

    def prepare(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> None:
        """Drop what the client kept about other weights, and measure the source's statistics where they are missing."""
        weights = digest(model)
        adapter = self.create(model, turn.client)
        if ADAPTER in state and state[WEIGHTS] == weights:
            adapter.load_state(state[ADAPTER])
        if adapter.needs_source:
            count = min(self.source_examples, len(data.train))
            clean = data.train.batch(torch.arange(count, device=data.train.rows.device))
            adapter.prepare(clean.x.cpu().numpy())
        state[ADAPTER], state[WEIGHTS] = adapter.state(), weights

    def adapt(self, model: nn.Module, stream: Iterable[Batch], state: State, turn: Turn) -> Iterator[Tensor]:
        """Answer each batch by the adapter, which goes on from the client's state."""
        adapter = self.create(model, turn.client)
        if ADAPTER in state:
            adapter.load_state(state[ADAPTER])
        for batch in stream:
            logits = adapter.predict(batch.x.cpu().numpy())
            self.work.forwards = adapter.forwards
            yield torch.from_numpy(logits).to(batch.x.device)
        state.setdefault(WEIGHTS, digest(model))
        state[ADAPTER] = adapter.state()
        self.work.extra |= adapter.metrics()


class StreamPredictor(TorchPredictor):
    """A torch model whose batch norms can start from other statistics than the source's (``MovesStatistics``)."""

    def statistics(self) -> dict[str, Array]:
        """Return copies of mean and variance of every batch norm, by their names in the state dict."""
        return {name: values.cpu().numpy().copy() for name, values in adaptation.statistics(self.model).items()}

    def moved(
        self, x: NDArray[Any], statistics: Mapping[str, Array], prior: float
    ) -> tuple[Prediction, dict[str, Array]]:
        """Predict with these in place of the source's statistics; return also the mixed ones that were used."""
        live = adaptation.statistics(self.model)
        used: dict[str, Array] = {}
        source = {name: values.clone() for name, values in live.items()}

        def note(layer: Any, *_: Any) -> None:
            for kind in ("running_mean", "running_var"):
                used[f"{prefixes[layer]}{kind}"] = getattr(layer, kind).cpu().numpy().copy()

        layers = batchnorm.layers(self.model)
        prefixes = {layer: f"{prefix}." if prefix else "" for prefix, layer in layers}
        # Registered before the hooks that mix, so it still sees the mixed statistics after a layer has run.
        handles = [layer.register_forward_hook(note) for _, layer in layers if layer.running_mean is not None]
        try:
            for name, values in statistics.items():
                live[name].copy_(torch.from_numpy(values))
            prediction = self(x, prior=prior)
        finally:
            for handle in handles:
                handle.remove()
            for name, own in source.items():
                live[name].copy_(own)
        return prediction, used


def digest(model: nn.Module) -> str:
    """Return a digest of all parameters and buffers of a model."""
    found = hashlib.blake2b(digest_size=16)
    for name, values in model.state_dict().items():
        found.update(name.encode())
        found.update(values.detach().cpu().contiguous().numpy())
    return found.hexdigest()
