"""What the image data sets share: reading with Pillow, channels, and the way from bytes to standardised tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trellis.data.base import DataSet
from trellis.data.sets._base import split, standardized
from trellis.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What Pillow may try. Its other readers start programs or are seldom exercised."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


def read(path: Path, size: int, channels: int) -> NDArray[np.uint8]:
    """Read an image file as uint8 of shape ``(channels, size, size)``.

    Raises:
        DataError: the file is no image, is cut short, or is far larger than an image should be.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            return pixels(image, size, channels)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError("data-image", f"{path}: not readable as an image: {type(error).__name__}: {error}") from None


def pixels(image: Image, size: int | None, channels: int) -> NDArray[np.uint8]:
    """Return a Pillow image as uint8 of shape ``(channels, height, width)``, resized if ``size`` is given."""
    from PIL.Image import Resampling

    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Resampling.BILINEAR)
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def unit(images: NDArray[np.uint8] | Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]."""
    tensor = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    return tensor.to(torch.float32) / 255


def image_data(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: tuple[str, ...],
    *,
    standardize: bool,
    source: str,
    **more: Any,
) -> DataSet:
    """Make a data set of images in [0, 1] and labels. ``more`` goes to ``DataSet``."""
    (train_x, test_x), facts = standardized(train[0], [test[0]], on=standardize)
    return DataSet(
        kind="image",
        train=split(train_x, train[1], len(classes), f"{source}, training"),
        test=split(test_x, test[1], len(classes), f"{source}, test"),
        classes=classes,
        facts=facts,
        **more,
    )
