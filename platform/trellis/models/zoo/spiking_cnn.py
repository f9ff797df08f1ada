"""A small convolutional network of spiking neurons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from trellis.errors import DataError
from trellis.models import spiking
from trellis.models._base import Classifier, Plain, Shape, image_shape
from trellis.registry import register
from trellis.scenario import Strict


class SpikingClassifier(Classifier):
    """Convolution, normalisation, neurons, average pooling, twice; a linear head on the spikes of each step.

    ``features(x)`` is the mean over the steps, so that ``forward(x)`` is the mean of the steps' outputs. One step is
    ``step(frame)``, which goes on from where the neurons are.

    Args:
        channels: of a frame.
        side: height and width of a frame.
        still: steps that a single image is shown for; event streams bring their own.
        tau: time constant of the neurons.
        surrogate: derivative of their spikes.
    """

    def __init__(
        self,
        channels: int,
        side: tuple[int, int],
        classes: int,
        width: int,
        norm: str,
        still: int,
        tau: float,
        surrogate: spiking.Surrogate,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for out in (width, 2 * width):
            layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=norm == "none"))
            layers += [nn.BatchNorm2d(out)] if norm == "batch" else []
            layers += [spiking.Lif(tau, surrogate), nn.AvgPool2d(2)]
            channels = out
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels * (side[0] // 4) * (side[1] // 4), classes)
        self.still = still

    def frames(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the steps' inputs ``(n, channels, h, w)`` of event streams ``(n, steps, ...)`` or images."""
        yield from x.unbind(1) if x.ndim == 5 else (x for _ in range(self.still))

    def step(self, frame: Tensor) -> Tensor:
        """Run one time step and return its output, one number per class."""
        output: Tensor = self.head(self.body(frame))
        return output

    def features(self, x: Tensor) -> Tensor:
        spiking.reset(self)
        steps = [self.body(frame) for frame in self.frames(x)]
        spiking.reset(self)
        mean: Tensor = sum(steps[1:], steps[0]) / len(steps)
        return mean


@register("models", "spiking-cnn", summary="two convolutional layers of leaky integrate-and-fire neurons")
class SpikingCnn(Plain):
    """For event streams ``(steps, channels, height, width)``, and for images, shown at every step alike.

    Batch norm sees one time step at a time: its running statistics move once a step and mix early, quiet steps with
    late ones.
    """

    class Config(Strict):
        width: int = Field(8, ge=1, description="channels of the first layer; the second has twice as many")
        tau: float = Field(1.1, ge=1, description="time constant of the neurons; at 1 they remember nothing")
        surrogate: spiking.Surrogate = "triangle"
        norm: Literal["none", "batch"] = "batch"
        steps: int = Field(4, ge=1, description="time steps of a single image")

    config: Config

    def build(self, shape: Shape, num_classes: int, facts: Mapping[str, Any]) -> nn.Module:
        del facts
        c = self.config
        if len(shape) == 4 and shape[0] < 1:
            raise DataError("model-shape", f"model 'spiking-cnn' takes event streams of one step and more, not {shape}")
        channels, height, width = image_shape(shape[-3:] if len(shape) == 4 else shape, "spiking-cnn", 4)
        size = height, width
        return SpikingClassifier(channels, size, num_classes, c.width, c.norm, c.steps, c.tau, c.surrogate)
