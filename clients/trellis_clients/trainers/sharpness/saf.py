"""SAF: hold every example's outputs near those it had a few epochs ago."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.data.base import Batch, ClientData, Split
from trellis.registry import register
from trellis_clients.trainer import Metrics, NonNegative, State, Task, Trainer, TrainerConfig, Turn
from trellis_clients.trainers.sharpness._trajectory import Memory, examples_an_epoch, trajectory_loss

MEMORY = "memory"
"""Key of a client's state: its examples' past outputs, and how many epochs it has done."""


@register(
    "trainers",
    "saf",
    paper="Du et al., Sharpness-Aware Training for Free, NeurIPS 2022",
    takes=("image", "vector", "tokens", "series", "points"),
    sends="weights",
)
class Saf(Trainer):
    """SAF (section 3.1): adds lambda · KL( softmax(past / tau) || softmax(outputs / tau) ) to the cross-entropy.

    A sharp minimum shows as a sudden drop of the loss along the way; the term holds an example's outputs near those it
    had E~ epochs ago, as its forward pass of that epoch gave them. No further pass is made. It acts from the epoch
    after E_start, on examples that have such a past; the mean is over these. There is no factor tau².

    In a federation an epoch is the client's own: the count and the memory live in its private state over all rounds,
    and are never sent. With one local epoch a round, E~ = 3 means the client's third last round, however long ago that
    was. The past is the client's own trajectory, not the global model's, and so the term also holds the client to its
    earlier self after the average has moved it. ``max_age`` bounds that for clients that sat rounds out: what is older
    counts as absent. Defaults for lambda, tau, E~ and E_start are the paper's for ImageNet.

    A past is of an example as it was then: with augmentation it is of another view, with mixed examples it means
    nothing.

    Measured on digits under Dirichlet 0.1, the paper's lambda pulls weakly (top eigenvalue 0.81 of SGD's); 2 gives
    0.57 at 1.7 times the training loss. Its use in a federation is against drift, with few clients a round:
    docs/methods/sharpness.md.
    """

    class Config(TrainerConfig):
        weight: NonNegative = Field(0.3, description="lambda, of the trajectory loss")
        temperature: Annotated[float, Field(gt=0)] = Field(5.0, description="tau")
        lookback: Annotated[int, Field(ge=1)] = Field(3, description="E~, epochs between the compared outputs")
        start_epoch: Annotated[int, Field(ge=0)] = Field(5, description="E_start, the client's epochs without the loss")
        max_age: Annotated[int, Field(ge=1)] | None = Field(
            None, description="outputs older than this many rounds are not used; null: however old"
        )

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task)
        self.memory = self._empty(0)  # one turn's; the state holds it between turns

    def fit(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        self.memory = self._empty(len(data.train))
        if MEMORY in state:
            self.memory.load(state[MEMORY])
        metrics = super().fit(model, data, state, turn)
        state[MEMORY] = self.memory.state()
        self.memory = self._empty(0, self.memory.epoch)
        return metrics

    def batches(self, split: Split, turn: Turn) -> Iterator[Batch]:
        if len(self.memory) != len(split):  # a replay of bare steps, which has no state at hand, at the same cost
            self.memory = self._empty(len(split), self.memory.epoch)
        seen, epoch = 0, examples_an_epoch(split, self.config)
        for batch in super().batches(split, turn):
            if seen % epoch == 0:
                self.memory.begin(turn.round, self.config.max_age)
            seen += len(batch)
            yield batch

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:
        c = self.config
        if not c.weight:
            return super().loss(model, batch, turn)
        outputs: Tensor = model(batch.x)
        past, known = self.memory.exchange(batch.index, outputs)
        loss = F.cross_entropy(outputs, batch.y)
        if self.memory.epoch <= max(c.start_epoch, c.lookback):
            return loss
        weight: float = c.weight
        return loss + weight * trajectory_loss(outputs, past, c.temperature, known)

    def _empty(self, examples: int, epoch: int = 0) -> Memory:
        return Memory(self.config.lookback, examples, self.task.device, epoch)
