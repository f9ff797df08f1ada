"""Another view of the same images: what test-time methods with a mean teacher show the student."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def another_view(pixels: Tensor, generator: Generator, flip: bool) -> Tensor:
    """Return new images in [0, 1] of shape ``(n, channels, height, width)``, each changed by its own draws.

    The kinds of change are CoTTA's: brightness, contrast and gamma (and with three channels saturation), rotation by up
    to 15 degrees, shifts by up to a sixteenth, scales from 0.9 to 1.1, Gaussian blur, a flip, Gaussian noise. Its
    hue is left out.
    """
    n = len(pixels)

    def between(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(n, generator=generator)).to(pixels.device)

    x = pixels * between(0.8, 1.2).view(-1, 1, 1, 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * between(0.85, 1.15).view(-1, 1, 1, 1)
    if x.shape[1] == 3:
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * between(0.75, 1.25).view(-1, 1, 1, 1)
    x = x.clamp(1e-6, 1) ** between(0.85, 1.15).view(-1, 1, 1, 1)
    x = _moved(x, between(-15, 15) * (math.pi / 180), between(0.9, 1.1), between(-1 / 8, 1 / 8), between(-1 / 8, 1 / 8))
    x = _blurred(x, between(0.0, 0.5))
    if flip:
        x = torch.where(between(0, 1).view(-1, 1, 1, 1) < 0.5, x.flip(3), x)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return (x + 0.005 * noise).clamp(0, 1)


def _moved(x: Tensor, angle: Tensor, scale: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Turn, scale and shift; shifts are in units of half a side. What comes in from outside repeats the border."""
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    matrix = torch.stack([torch.stack([cosine, -sine, right], 1), torch.stack([sine, cosine, down], 1)], 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _blurred(x: Tensor, deviation: Tensor) -> Tensor:
    """Blur each image by a 3x3 Gaussian of its own deviation in pixels."""
    side = torch.exp(-1 / (2 * deviation.clamp(min=1e-3) ** 2))
    line = torch.stack([side, torch.ones_like(side), side], 1)
    line = line / line.sum(1, keepdim=True)
    n, channels, height, width = x.shape
    kernel = (line[:, :, None] * line[:, None, :]).repeat_interleave(channels, 0)[:, None]
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate").reshape(1, n * channels, height + 2, width + 2)
    return F.conv2d(padded, kernel, groups=n * channels).reshape(n, channels, height, width)
