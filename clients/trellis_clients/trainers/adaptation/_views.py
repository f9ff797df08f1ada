"""Another view of the same images: what test-time methods with a mean teacher show the student."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

LUMINANCE = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in grey, as torchvision's colour functions have them."""
BLUR = 2
"""Pixels to each side of the middle of the blur's kernel."""


def another_view(pixels: Tensor, generator: Generator, flip: bool) -> Tensor:
    """Return new images in [0, 1] of shape ``(n, channels, height, width)``, each changed by its own draws.

    CoTTA's changes at the strengths of RMT's authors (``get_tta_transforms`` in github.com/mariodoebler/
    test-time-adaptation): brightness 0.6 to 1.4, contrast 0.7 to 1.3, with three channels saturation 0.5 to 1.5, gamma
    0.7 to 1.3; rotation by up to 15 degrees, shifts by up to an eighth of the side in whole pixels, scale 0.9 to 1.1,
    the border repeated outwards; a 5x5 Gaussian blur of up to half a pixel; a mirror image; Gaussian noise of 0.005.

    What differs: each image has its own draws, where theirs are one set a batch; colours change in the order above,
    where theirs is drawn anew; hue (by up to 0.06) stays.
    """
    n, height, width = len(pixels), pixels.shape[2], pixels.shape[3]

    def between(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(n, generator=generator)).to(pixels.device)

    x = _recoloured(pixels, between(0.6, 1.4), between(0.7, 1.3), between(0.5, 1.5), between(0.7, 1.3))
    x = F.pad(x, (BLUR,) * 4, mode="replicate")  # so that the blur sees what was moved in from outside
    angle, scale = between(-15, 15) * (math.pi / 180), between(0.9, 1.1)
    x = _moved(x, angle, scale, between(-width / 8, width / 8).round(), between(-height / 8, height / 8).round())
    x = _blurred(x, between(0.001, 0.5))
    if flip:
        x = torch.where(between(0, 1).view(-1, 1, 1, 1) < 0.5, x.flip(3), x)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return (x + 0.005 * noise).clamp(0, 1)


def _recoloured(x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, gamma: Tensor) -> Tensor:
    """Change colours by one factor an image each; every step is cut off at black and white."""
    brightness, contrast, saturation, gamma = (v.view(-1, 1, 1, 1) for v in (brightness, contrast, saturation, gamma))
    x = (x * brightness).clamp(0, 1)
    mean = _grey(x).mean((1, 2, 3), keepdim=True)
    x = (mean + (x - mean) * contrast).clamp(0, 1)
    if x.shape[1] == 3:
        grey = _grey(x)
        x = (grey + (x - grey) * saturation).clamp(0, 1)
    return x.clamp(min=1e-8) ** gamma


def _grey(x: Tensor) -> Tensor:
    """Return images of one channel."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * torch.tensor(LUMINANCE, device=x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _moved(x: Tensor, angle: Tensor, scale: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Turn by radians and scale about the middle, then shift by pixels; from outside comes the border, repeated."""
    height, width = x.shape[2:]
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    across = torch.stack([cosine, sine * height / width, -2 / width * (cosine * right + sine * down)], 1)
    along = torch.stack([-sine * width / height, cosine, -2 / height * (cosine * down - sine * right)], 1)
    grid = F.affine_grid(torch.stack([across, along], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _blurred(x: Tensor, deviation: Tensor) -> Tensor:
    """Blur each image by a Gaussian of its own deviation in pixels; the result is smaller by ``BLUR`` on every side."""
    steps = torch.arange(-BLUR, BLUR + 1, device=x.device)
    line = torch.exp(-(steps**2) / (2 * deviation[:, None] ** 2))
    line = line / line.sum(1, keepdim=True)
    n, channels, height, width = x.shape
    kernel = (line[:, :, None] * line[:, None, :]).repeat_interleave(channels, 0)[:, None]
    blurred = F.conv2d(x.reshape(1, n * channels, height, width), kernel, groups=n * channels)
    return blurred.reshape(n, channels, height - 2 * BLUR, width - 2 * BLUR)
