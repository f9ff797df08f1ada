"""Common image corruptions on small tensors, under the names of Hendrycks and Dietterich (ICLR 2019, arXiv 1903.12261).

Written here because no library serves: ``imagecorruptions`` refuses images below 32 pixels and calls NumPy and
scikit-image functions that are gone; scikit-image has the noises only. What images of 8 to 64 pixels can show is
here; ``glass_blur``, ``snow``, ``frost`` and ``spatter``, which need larger images or photographs of frost, are not.

Strengths that are no lengths (noises, brightness, contrast, fog, pixelate, JPEG) are ImageNet-C's. Lengths in pixels
are those of CIFAR-10-C, made for 32 pixels, in proportion to the image's side. Fog is a sum of smooth noises of
halving amplitude in place of the diamond-square fractal; the elastic transform leaves out the affine part.

A corruption takes images in [0, 1] of shape ``(n, channels, height, width)``, a severity from 1 to 5 and a CPU
generator, and returns new images in [0, 1] of the same shape. In between, strengths are interpolated.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from trellis.errors import DataError, listed, nearest

CLEAN = "clean"
"""The name under which a stream may ask for unharmed images."""

Corruption = Callable[[Tensor, float, Generator], Tensor]


def corrupt(images: Tensor, name: str, severity: float, generator: Generator) -> Tensor:
    """Return corrupted copies of images in [0, 1].

    Args:
        images: float32 on the CPU, shape ``(n, channels, height, width)``.
        name: one of ``CORRUPTIONS``, or ``clean``.
        severity: from 1 to 5; fractions lie between two levels.
        generator: where the randomness comes from.

    Raises:
        DataError: no corruption has that name.
    """
    if name == CLEAN:
        return images
    check_name(name)
    assert 1 <= severity <= 5, severity
    return CORRUPTIONS[name](images, severity, generator).clamp(0, 1)


def check_name(name: str) -> None:
    """Raise a ``DataError`` that names the nearest corruption if there is none of that name."""
    if name != CLEAN and name not in CORRUPTIONS:
        known = (*CORRUPTIONS, CLEAN)
        raise DataError("corruption-unknown", f"no corruption {name!r}.{nearest(name, known)} Known: {listed(known)}")


def _at(levels: Sequence[float], severity: float) -> float:
    """Return the strength of a severity, on the line between the two whole levels beside it."""
    return float(np.interp(severity, range(1, 6), levels))


def _pixels(images: Tensor, length: float) -> float:
    """Turn a length at 32 pixels into one of these images."""
    return length * images.shape[-1] / 32


def _normal(images: Tensor, generator: Generator) -> Tensor:
    return torch.randn(images.shape, generator=generator)


# -- noise ------------------------------------------------------------------------------------------------


def gaussian_noise(x: Tensor, severity: float, generator: Generator) -> Tensor:
    return x + _at((0.08, 0.12, 0.18, 0.26, 0.38), severity) * _normal(x, generator)


def shot_noise(x: Tensor, severity: float, generator: Generator) -> Tensor:
    photons = _at((60, 25, 12, 5, 3), severity)
    return torch.poisson(x * photons, generator=generator) / photons


def impulse_noise(x: Tensor, severity: float, generator: Generator) -> Tensor:
    share = _at((0.03, 0.06, 0.09, 0.17, 0.27), severity)
    drawn = torch.rand(x.shape, generator=generator)
    return x.masked_fill(drawn < share / 2, 0.0).masked_fill(drawn > 1 - share / 2, 1.0)


def speckle_noise(x: Tensor, severity: float, generator: Generator) -> Tensor:
    return x + x * _at((0.15, 0.2, 0.35, 0.45, 0.6), severity) * _normal(x, generator)


# -- blur -------------------------------------------------------------------------------------------------


def gaussian_blur(x: Tensor, severity: float, generator: Generator) -> Tensor:
    del generator
    return _smooth(x, _pixels(x, _at((0.4, 0.6, 0.7, 0.8, 1.0), severity)))


def defocus_blur(x: Tensor, severity: float, generator: Generator) -> Tensor:
    del generator
    radius = _pixels(x, _at((0.3, 0.4, 0.5, 1.0, 1.5), severity))
    soft = _pixels(x, _at((0.4, 0.5, 0.6, 0.2, 0.1), severity))
    grid = _offsets(math.ceil(radius) + 1)
    distance = (grid[:, None] ** 2 + grid[None, :] ** 2).sqrt()
    disk = (radius + 0.5 - distance).clamp(0, 1)  # a pixel on the rim counts by the part inside
    return _smooth(_convolve(x, disk.expand(len(x), -1, -1)), soft)


def motion_blur(x: Tensor, severity: float, generator: Generator) -> Tensor:
    """Smear along a line; each image has its own direction within 45 degrees of the horizontal."""
    length = _pixels(x, _at((6, 6, 6, 8, 9), severity))
    sigma = max(_pixels(x, _at((1.0, 1.5, 2.0, 2.5, 3.0), severity)), 0.3)
    angle = (torch.rand(len(x), 1, 1, generator=generator) - 0.5) * math.pi / 2
    grid = _offsets(max(math.ceil(length / 2), 1))
    along = grid[None, None, :] * angle.cos() + grid[None, :, None] * angle.sin()
    across = grid[None, :, None] * angle.cos() - grid[None, None, :] * angle.sin()
    kernels = torch.exp(-(along**2) / (2 * sigma**2)) * (1 - across.abs()).clamp(min=0)
    return _convolve(x, kernels)


def zoom_blur(x: Tensor, severity: float, generator: Generator) -> Tensor:
    del generator
    furthest = _at((1.06, 1.11, 1.16, 1.21, 1.31), severity)
    factors = torch.linspace(1.0, furthest, 6)
    zoomed = [_sample(x, _identity(x) / float(factor)) for factor in factors]
    return torch.stack(zoomed).mean(0)


# -- weather and light ------------------------------------------------------------------------------------


def fog(x: Tensor, severity: float, generator: Generator) -> Tensor:
    """Add a cloud and scale back, so that the brightest pixel of an image stays as bright."""
    strength = _at((1.5, 2.0, 2.5, 2.5, 3.0), severity)
    decay = _at((2.0, 2.0, 1.7, 1.5, 1.4), severity)
    side = max(x.shape[-2:])
    cloud = torch.zeros(len(x), 1, *x.shape[-2:])
    cells, amplitude = 2, 1.0
    while cells <= side:
        noise = torch.rand(len(x), 1, cells, cells, generator=generator)
        cloud += amplitude * F.interpolate(noise, x.shape[-2:], mode="bilinear", align_corners=True)
        cells, amplitude = cells * 2, amplitude / decay
    low, high = cloud.amin((2, 3), keepdim=True), cloud.amax((2, 3), keepdim=True)
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + strength * (cloud - low) / (high - low).clamp(min=1e-6)) * brightest / (brightest + strength)


def brightness(x: Tensor, severity: float, generator: Generator) -> Tensor:
    """Raise the value of HSV, which for grey images is the grey."""
    del generator
    value = x.amax(1, keepdim=True)
    raised = (value + _at((0.1, 0.2, 0.3, 0.4, 0.5), severity)).clamp(max=1)
    return torch.where(value > 0, x * raised / value.clamp(min=1e-6), raised)


def contrast(x: Tensor, severity: float, generator: Generator) -> Tensor:
    del generator
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * _at((0.4, 0.3, 0.2, 0.1, 0.05), severity) + mean


# -- geometry and coding ----------------------------------------------------------------------------------


def elastic_transform(x: Tensor, severity: float, generator: Generator) -> Tensor:
    """Move every pixel by a smooth random field, up to about two pixels of 32."""
    most = _pixels(x, _at((0.6, 0.9, 1.2, 1.6, 2.0), severity))
    field = _smooth(_normal(x.new_empty(len(x), 2, *x.shape[-2:]), generator), _pixels(x, 4.0))
    field = field / field.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-6) * most
    return _sample(x, _identity(x) + field.permute(0, 2, 3, 1) * 2 / x.shape[-1])


def pixelate(x: Tensor, severity: float, generator: Generator) -> Tensor:
    del generator
    share = _at((0.6, 0.5, 0.4, 0.3, 0.25), severity)
    size = [max(round(side * share), 1) for side in x.shape[-2:]]
    return F.interpolate(F.interpolate(x, size, mode="area"), x.shape[-2:], mode="nearest")


def jpeg_compression(x: Tensor, severity: float, generator: Generator) -> Tensor:
    from PIL import Image

    del generator
    quality = round(_at((25, 18, 15, 10, 7), severity))
    result = []
    for pixels in (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        coded = io.BytesIO()
        grey = pixels.shape[-1] == 1
        Image.fromarray(pixels[..., 0] if grey else pixels).save(coded, "JPEG", quality=quality)
        with Image.open(coded, formats=("JPEG",)) as image:
            decoded = np.asarray(image, dtype=np.float32) / 255
        result.append(torch.from_numpy(decoded[None] if grey else decoded.transpose(2, 0, 1).copy()))
    return torch.stack(result) if result else x


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        speckle_noise,
        gaussian_blur,
        defocus_blur,
        motion_blur,
        zoom_blur,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}


# -- shared pieces ----------------------------------------------------------------------------------------


def _offsets(radius: int) -> Tensor:
    return torch.arange(-radius, radius + 1, dtype=torch.float32)


def _smooth(x: Tensor, sigma: float) -> Tensor:
    """Convolve with a Gaussian of ``sigma`` pixels."""
    grid = _offsets(max(math.ceil(3 * sigma), 1))
    line = torch.exp(-(grid**2) / (2 * max(sigma, 1e-3) ** 2))
    return _convolve(x, (line[:, None] * line[None, :]).expand(len(x), -1, -1))


def _convolve(x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve image i with kernel i, scaled to sum one, repeating the border."""
    n, channels = x.shape[:2]
    radius = kernels.shape[-1] // 2
    kernels = kernels / kernels.sum((1, 2), keepdim=True)
    padded = F.pad(x, (radius,) * 4, mode="replicate").reshape(1, n * channels, *(s + 2 * radius for s in x.shape[-2:]))
    return F.conv2d(padded, kernels.repeat_interleave(channels, 0)[:, None], groups=n * channels).reshape(x.shape)


def _identity(x: Tensor) -> Tensor:
    """Return the sampling grid that changes nothing, shape ``(n, height, width, 2)``."""
    return F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False)


def _sample(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
