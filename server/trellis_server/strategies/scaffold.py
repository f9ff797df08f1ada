"""SCAFFOLD: the cloud's control variate, which tells every client how the others' gradients differ from its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray
from pydantic import Field

from trellis import records
from trellis.errors import RoundError
from trellis.registry import register
from trellis_server import folding
from trellis_server.strategies._build import BuildContext, Sampling, sampling

CONTROL = "control"
"""ArrayRecord beside the model: to clients the control c, from clients the change of their own, c_i+ - c_i."""


class Scaffold(FedAvg):
    """SCAFFOLD's server (Algorithm 1): x += lr · mean(y_i - x), c += |S| / N · mean(c_i+ - c_i), equal weights.

    Every float array has a control, zero at first. Clients answer with changes for those they train; the server's
    learning rate applies to these, and all others (running statistics, counters) become the clients' mean.

    Args:
        num_clients: N, all clients there are.
        server_lr: the global step size; 1 makes the new model the mean of the clients' models.
        **sampling: as of ``FedAvg``.
    """

    def __init__(self, num_clients: int, server_lr: float = 1.0, **sampling: Any) -> None:
        super().__init__(**sampling)
        self.num_clients = num_clients
        self.server_lr = server_lr
        self.control: dict[str, NDArray[Any]] = {}
        self.sent = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the control beside the model."""
        self.sent = arrays
        for name, array in arrays.items():
            values = records.view(array)
            if name not in self.control and values.dtype.kind == "f":
                self.control[name] = np.zeros_like(values)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        control = records.array_record(self.control)
        for message in messages:
            message.content[CONTROL] = control
        return messages

    def fold(self, replies: Iterable[Message]) -> list[Message]:
        """Average models and control changes with equal weights, one reply at a time."""
        return folding.fold(replies, self.weighted_by_key, uniform=True)

    def aggregate_train(
        self,
        server_round: int,  # noqa: ARG002
        replies: Iterable[Message],
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Move model and control. Takes replies, or what ``fold`` made of them.

        Raises:
            RoundError: replies carry no ``control``, or one for arrays that have none.
        """
        averages = [message for message in self.fold(replies) if not message.has_error()]
        if not averages:
            return None, None
        content = averages[0].content
        arrays = records.array_records(content)
        change = arrays.get(CONTROL)
        if change is None:
            raise RoundError("scaffold-control", f"replies carry no ArrayRecord {CONTROL!r}; is the trainer scaffold?")
        if unknown := change.keys() - self.control.keys():
            raise RoundError("scaffold-control", f"replies carry a control for {min(unknown)!r}, which has none here")
        count = content[folding.FOLDED]["replies"]
        assert isinstance(count, int)
        moved = {}
        for name, array in arrays[self.arrayrecord_key].items():
            mean = records.view(array)
            if name in change and self.server_lr != 1.0:
                start = records.view(self.sent[name])
                mean = start + self.server_lr * (mean - start)
            moved[name] = mean
        share = count / self.num_clients
        # New arrays, not changes in place: the ones that were sent may still be read.
        self.control |= {name: self.control[name] + share * records.view(array) for name, array in change.items()}
        metrics = self.train_metrics_aggr_fn([content], self.weighted_by_key)
        return records.array_record(moved), metrics

    def state_dict(self) -> dict[str, Any]:
        """Return what the next round needs: the control."""
        return {"control": self.control}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.control = dict(state["control"])


@register(
    "strategies",
    "scaffold",
    summary="SCAFFOLD: corrects client drift with control variates",
    paper="https://arxiv.org/abs/1910.06378",
    merges="scaffold",
)
class ScaffoldPlugin:
    """SCAFFOLD, for the trainer of the same name."""

    class Config(Sampling):
        server_lr: float = Field(1.0, gt=0, description="global step size")

    def __init__(self, config: Config) -> None:
        self.config = config

    def build(self, context: BuildContext) -> Scaffold:
        return Scaffold(context.num_clients, self.config.server_lr, **sampling(self.config, context))
