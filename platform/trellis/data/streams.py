"""Test streams that drift: an edge's own examples, batch after batch, under a sequence of corruptions and label orders.

A stream is a function of the seed, the client and a position, and keeps nothing: a device that was away goes on
where it was, and a resumed run sees the same pixels. Labels come along for counting right answers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from trellis import seeding
from trellis.data.base import Split
from trellis.data.corruptions import check_name, corrupt
from trellis.errors import DataError
from trellis.scenario import Strict

LEAST, MOST = 1.0, 5.0

Labels = Literal["shuffled", "sorted", "dirichlet"]
"""Order of the examples of a section by their labels."""


class StreamConfig(Strict):
    """What an edge sees. Defaults are six kinds of common corruption, ten batches of each."""

    corruptions: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        ("gaussian_noise", "contrast", "motion_blur", "fog", "impulse_noise", "brightness"),
        description="names of trellis.data.corruptions in order; 'clean' is unharmed",
    )
    severity: float = Field(5.0, ge=LEAST, le=MOST)
    schedule: Literal["abrupt", "gradual", "recurring"] = Field(
        "abrupt",
        description="abrupt: each corruption at full severity, the last one stays; gradual: each rises from severity 1 "
        "and falls back before the next; recurring: abrupt, and from the start again after the last",
    )
    segment: int = Field(10, ge=1, description="batches under each corruption")
    labels: Labels | Annotated[tuple[Labels, ...], Field(min_length=1)] = Field(
        "shuffled",
        description="order of the examples within each section (the batches of one corruption): shuffled; sorted: one "
        "class after another, in an order of classes drawn for the section; dirichlet: labels correlated in time, as "
        "many stretches as classes, the share of each class that falls into each drawn from Dirichlet(alpha). A list "
        "gives the sections theirs in turn",
    )
    alpha: float = Field(0.1, gt=0, description="of labels: dirichlet; small: a stretch has few classes")
    batch_size: int = Field(32, ge=1)
    rotate: bool = Field(True, description="client i starts with corruption i, so that edges differ at any time")
    samples_per_second: float = Field(10.0, gt=0, description="the clock of the stream, for budgets per hour")

    @field_validator("corruptions")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            try:
                check_name(name)
            except DataError as error:
                raise ValueError(error.message) from None
        return names

    @property
    def batch_hours(self) -> float:
        """Hours of stream time that a batch takes."""
        return self.batch_size / self.samples_per_second / 3600


@dataclass(frozen=True)
class Stream:
    """One client's stream.

    Args:
        config: what happens to the images.
        split: the client's examples; every pass over them has an order of its own.
        mean: what was subtracted from pixels in [0, 1], per channel or a single value.
        std: what they were divided by after that.
        seed: the run's seed.
        client: the client's number.
    """

    config: StreamConfig
    split: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    client: int

    def __post_init__(self) -> None:
        if len(self.split) < 1:
            raise DataError(
                "stream-empty",
                f"client {self.client} has no test examples to stream; raise partition.test_fraction",
            )

    def phase(self, position: int) -> tuple[str, float]:
        """Return name and severity of the corruption at a batch."""
        c = self.config
        segment, within = divmod(position, c.segment)
        if c.schedule != "recurring" and segment >= len(c.corruptions):
            segment, within = len(c.corruptions) - 1, c.segment - 1 if c.schedule == "abrupt" else c.segment // 2
        first = self.client if c.rotate else 0
        name = c.corruptions[(first + segment) % len(c.corruptions)]
        if c.schedule != "gradual" or c.segment < 3:
            return name, c.severity
        middle = (c.segment - 1) / 2
        return name, LEAST + (c.severity - LEAST) * (1 - abs(within - middle) / middle if within != middle else 1.0)

    def batch(self, position: int) -> tuple[Tensor, Tensor]:
        """Return images, standardised as the data set's are, and labels of the batch at a position."""
        index = self._index(position).to(self.split.rows.device)
        examples = self.split.batch(index)
        name, severity = self.phase(position)
        generator = seeding.torch_generator(self.seed, "stream", self.client, position)
        pixels = corrupt(self.to_pixels(examples.x).cpu(), name, severity, generator)
        return self.to_inputs(pixels.to(examples.x.device)), examples.y

    def to_pixels(self, inputs: Tensor) -> Tensor:
        """Return the model's inputs as pixels in [0, 1]."""
        mean, std = (self._per_channel(v, inputs) for v in (self.mean, self.std))
        return (inputs * std + mean).clamp(0, 1)

    def to_inputs(self, pixels: Tensor) -> Tensor:
        """Return pixels in [0, 1] as the model's inputs."""
        mean, std = (self._per_channel(v, pixels) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def _index(self, position: int) -> Tensor:
        """Positions in the split of the examples of a batch.

        Passes over the split follow one another, each in an order of its own. Label orders rearrange what falls into a
        section, so every pass still shows every example once.
        """
        c = self.config
        section, within = divmod(position, c.segment)
        order = c.labels if isinstance(c.labels, str) else c.labels[section % len(c.labels)]
        if order == "shuffled":
            return self._shuffled(position * c.batch_size, c.batch_size)
        shuffled = self._shuffled(section * c.segment * c.batch_size, c.segment * c.batch_size)
        labels = self.split.fields["y"][self.split.rows[shuffled.to(self.split.rows.device)]].cpu()
        generator = seeding.numpy_generator(self.seed, "labels", self.client, section)
        keys = _stretches(labels.numpy(), None if order == "sorted" else c.alpha, generator)
        rearranged = shuffled[torch.from_numpy(np.argsort(keys, kind="stable"))]
        return rearranged[within * c.batch_size : (within + 1) * c.batch_size]

    def _shuffled(self, start: int, count: int) -> Tensor:
        size = len(self.split)
        passes, places = np.divmod(np.arange(start, start + count), size)
        index = torch.empty(count, dtype=torch.int64)
        for each in np.unique(passes):
            generator = seeding.torch_generator(self.seed, "pass", self.client, int(each))
            here = torch.from_numpy(passes == each)
            index[here] = torch.randperm(size, generator=generator)[torch.from_numpy(places)[here]]
        return index

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


def _stretches(labels: NDArray[np.int64], alpha: float | None, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return for each example of a section the stretch it belongs to.

    With ``alpha`` None every class is a stretch. Else there are as many stretches as classes, and each class is dealt
    out to them by shares from a symmetric Dirichlet distribution (as in Gong et al., NeurIPS 2022, section 4).
    """
    classes = np.unique(labels)
    stretch = np.empty(len(labels), np.int64)
    for place, each in enumerate(generator.permutation(classes)):
        (members,) = np.nonzero(labels == each)
        if alpha is None:
            stretch[members] = place
            continue
        ends = np.cumsum(generator.dirichlet(np.full(len(classes), alpha)))[:-1] * len(members)
        stretch[members] = np.searchsorted(ends, np.arange(len(members)) + 0.5)
    return stretch
