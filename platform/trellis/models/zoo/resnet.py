"""The residual networks for small images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trellis.models._base import Classifier, Norm, Plain, Shape, image_shape, norm_layer
from trellis.registry import register
from trellis.scenario import Strict


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut without weights (option A of the paper)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)
        self.norm1 = norm_layer(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.norm2 = norm_layer(norm, outputs)
        self.stride, self.new_channels = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + shortcut)


class ResNetClassifier(Classifier):
    """A 3x3 stem, three stages of blocks at full, half and quarter size, global average pooling.

    Convolutions start as in He et al., "Delving Deep into Rectifiers" (normal, fan-out). Without normalisation the
    second convolution of a block starts at zero, so that the signal does not grow with depth (the idea of Fixup,
    arXiv 1901.09321).
    """

    def __init__(self, channels: int, classes: int, depth: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=norm == "none")
        self.stem_norm = norm_layer(norm, width)
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(3):
            for number in range((depth - 2) // 6):
                outputs = width * 2**stage
                blocks.append(Block(inputs, outputs, 2 if stage and not number else 1, norm))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if norm == "none":
            for block in self.blocks:
                assert isinstance(block, Block)
                nn.init.zeros_(block.conv2.weight)

    def features(self, x: Tensor) -> Tensor:
        maps: Tensor = self.blocks(F.relu(self.stem_norm(self.stem(x))))
        return maps.mean((2, 3))


@register("models", "resnet", summary="ResNet-8, -14 or -20 for small images", paper="arXiv 1512.03385")
class ResNet(Plain):
    """He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.

    With ``depth: 20``, ``width: 16`` and batch normalisation it is the paper's ResNet-20 for CIFAR-10 (0.27 M
    weights). Group normalisation is the usual choice where clients' data differ (arXiv 1910.00189).
    """

    class Config(Strict):
        depth: Literal[8, 14, 20] = 8
        width: int = Field(16, ge=1, description="channels of the first stage; the others have two and four times it")
        norm: Norm = "batch"

    config: Config

    def build(self, shape: Shape, num_classes: int, facts: Mapping[str, Any]) -> nn.Module:
        del facts
        channels, _, _ = image_shape(shape, "resnet", 8)
        config = self.config
        return ResNetClassifier(channels, num_classes, config.depth, config.width, config.norm)
