"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 images of each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from trellis.data.base import DataSet
from trellis.data.sets._base import Source
from trellis.data.sets._images import image_data, read, unit
from trellis.errors import DataError
from trellis.registry import register
from trellis.scenario import Strict

FOLDERS = {"background": "images_background", "evaluation": "images_evaluation"}
Character = tuple[str, Path]
"""``alphabet/character`` and its folder."""


@register("datasets", "omniglot", summary="handwritten characters of 50 alphabets, from its published folders")
class Omniglot(Source):
    """Lake, Salakhutdinov and Tenenbaum, Human-level concept learning through probabilistic program induction, 2015.

    ``root`` holds what the two published archives unpack to::

        images_background/<alphabet>/<character>/<character number>_<drawer>.png     964 characters
        images_evaluation/<alphabet>/<character>/<character number>_<drawer>.png     659 characters

    Classes are the characters, those of the background set first, each set in the order of its names; a class is
    named ``alphabet/character``. Images are inverted, so that strokes are 1 on 0. Of each class, the last
    ``test_images`` drawers (the number after the underscore) are the test examples; a drawer's id is the natural
    id of an example. With ``rotations`` every character turned by quarters is a class of its own, as in
    few-shot learning; the turned classes follow the upright ones of their set. ``x`` is ``(n, 1, size, size)``.
    """

    class Config(Strict):
        root: str = Field(description="the folder that holds images_background and images_evaluation")
        sets: Literal["both", "background", "evaluation"] = "both"
        size: int = Field(28, ge=8, le=105, description="pixels a side; the published images have 105")
        rotations: bool = Field(False, description="characters turned by 90, 180 and 270 degrees are classes too")
        max_characters: int | None = Field(None, ge=1, description="of each set, the first so many; all if not given")
        test_images: int = Field(5, ge=0, description="of each class, held out")
        standardize: bool = Field(False, description="mean 0 and deviation 1 over the training examples")

    config: Config

    def load(self, seed: int) -> DataSet:
        del seed  # real data; the held-out part must not move with the seed
        root = self.path("root", self.config.root)
        images: list[Tensor] = []
        labels: list[Tensor] = []
        held: list[Tensor] = []
        drawers: list[str] = []
        classes: list[str] = []
        for name in FOLDERS if self.config.sets == "both" else (self.config.sets,):
            characters = _characters(root / FOLDERS[name])[: self.config.max_characters]
            x, y, out, who = self._read(characters)
            for quarters in range(4 if self.config.rotations else 1):
                images.append(torch.rot90(x, quarters, (2, 3)))
                labels.append(y + len(classes))
                held.append(out)
                drawers += who
                suffix = f"@{90 * quarters}" if quarters else ""
                classes += [character + suffix for character, _ in characters]
        x, y, test = torch.cat(images), torch.cat(labels), torch.cat(held)
        return image_data(
            (x[~test], y[~test]),
            (x[test], y[test]),
            tuple(classes),
            standardize=self.config.standardize,
            source=str(root),
            natural_id=[who for who, out in zip(drawers, test.tolist(), strict=True) if not out],
        )

    def _read(self, characters: list[Character]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Return images in [0, 1] with strokes 1, labels from 0, which are held out, and who drew them."""
        images: list[NDArray[np.uint8]] = []
        labels, held, drawers = [], [], []
        for label, (name, folder) in enumerate(characters):
            files = _drawings(folder)
            kept = len(files) - self.config.test_images
            if kept < 1:
                raise DataError(
                    "data-empty",
                    f"{folder}: {len(files)} images, of which data.test_images {self.config.test_images} are held out;"
                    f" none of {name} is left to learn from",
                )
            for position, (path, drawer) in enumerate(files):
                images.append(read(path, self.config.size, 1))
                labels.append(label)
                held.append(position >= kept)
                drawers.append(drawer)
        return 1 - unit(np.stack(images)), torch.tensor(labels), torch.tensor(held), drawers


def _characters(folder: Path) -> list[Character]:
    """Return the characters of one of the two sets, in the order of their names."""
    found = [
        (f"{alphabet.name}/{character.name}", character)
        for alphabet in _folders(folder)
        for character in _folders(alphabet)
    ]
    if not found:
        raise DataError("data-empty", f"{folder}: no <alphabet>/<character> folders")
    return found


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(
            "data-missing", f"{folder} is not a folder; Omniglot unpacks to {' and '.join(FOLDERS.values())}"
        )
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in entries:
        if not path.is_dir():
            raise DataError("data-stray", f"{path}: a file where a folder should be")
    return entries


def _drawings(folder: Path) -> list[tuple[Path, str]]:
    """Return a character's images with who drew them, in the order of the drawers."""
    found = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        number, underscore, drawer = path.stem.partition("_")
        if path.suffix.lower() != ".png" or not underscore or not (number.isdecimal() and drawer.isdecimal()):
            raise DataError("data-stray", f"{path}: not named <character>_<drawer>.png")
        found.append((path, drawer))
    return sorted(found, key=lambda pair: (int(pair[1]), pair[0].name))
