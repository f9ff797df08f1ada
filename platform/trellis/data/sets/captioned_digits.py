"""The bundled digits, placed on a canvas, with a caption each."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from trellis import seeding
from trellis.data.base import DataSet, Split
from trellis.data.sets._base import Source, held_out, split, standardized
from trellis.registry import register
from trellis.scenario import Strict

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS = ("top", "bottom", "middle")
COLUMNS = ("left", "right", "centre")
OFFSETS = (0, 8, 4)
"""Where a digit of 8 pixels lies on the canvas of 16, for each of the above."""
TONES = (("bright", "strong"), ("faint", "pale"))
TEMPLATES = (
    "a {tone} {digit} at the {row} {column}",
    "{digit} at the {row} {column} and {tone}",
    "{row} {column} a {tone} {digit}",
    "the {row} {column} shows a {tone} {digit}",
)
LENGTH = 7
"""Tokens of a caption; shorter ones are filled up with token 0."""


def vocabulary() -> tuple[str, ...]:
    """Return the words by token; token 0 is no word."""
    fixed = {word for template in TEMPLATES for word in template.split() if not word.startswith("{")}
    words = fixed | {*DIGITS, *ROWS, *COLUMNS} | {word for pair in TONES for word in pair}
    return ("", *sorted(words))


def caption(digit: int, row: int, column: int, tone: int, word: int, template: int = 0) -> str:
    """Return the words for a digit, its place and its brightness."""
    return TEMPLATES[template].format(
        digit=DIGITS[digit], row=ROWS[row], column=COLUMNS[column], tone=TONES[tone][word]
    )


def tokens(text: str) -> list[int]:
    """Return a caption's tokens, ``LENGTH`` of them."""
    words, known = text.split(), vocabulary()
    return [known.index(word) for word in words] + [0] * (LENGTH - len(words))


@register(
    "datasets", "captioned-digits", summary="the bundled digits placed on a canvas, with made-up captions", kind="pairs"
)
class CaptionedDigits(Source):
    """1797 pairs of an image and a caption such as "a faint seven at the top left".

    What is real: the handwritten digits of 8x8 pixels (scikit-learn's, see ``digits``). What is made: each is put into
    one of four places of a canvas of 16x16, bright or faint, and these choices and the words of its caption (four
    orders of words, two words for each brightness) are drawn by the run's seed. So the captions are true, but have the
    wealth of a form with four fields, not of language. There are 80 meanings: one other caption in 80 fits an image as
    well as its own (one in 20 without ``places``, one in 10 without ``tones``, too). The examples held out are the same
    for every seed; their places and captions are not.

    ``x`` is ``(n, 1, 16, 16)``, ``tokens`` int64 ``(n, 7)`` with 0 for none, ``y`` the digit, which methods that learn
    from pairs do not look at. Facts: ``vocabulary``, the words by token; ``class_tokens``, int64 ``(10, m, 7)``, for
    each digit a caption with every place and word for its brightness, for telling digits apart by text.
    """

    class Config(Strict):
        places: bool = Field(True, description="in one of four corners; if not, all in the middle")
        tones: bool = Field(True, description="bright or faint; if not, all bright")
        standardize: bool = Field(True, description="mean 0 and deviation 1 over the training examples")
        test_fraction: float = Field(0.2, ge=0, lt=1, description="held out; the same examples for every seed")

    config: Config

    def load(self, seed: int) -> DataSet:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images.astype(np.float32) / 16)
        x, captions = self.composed(images, digits.target, seed)
        y = torch.from_numpy(digits.target.astype(np.int64))
        train, test = (torch.from_numpy(rows) for rows in held_out(digits.target, self.config.test_fraction))
        (shown, hidden), facts = standardized(x[train], [x[test]], on=self.config.standardize)

        def pairs(pixels: Tensor, rows: Tensor) -> Split:
            checked = split(pixels, y[rows], 10, "captioned-digits")
            return Split({**checked.fields, "tokens": captions[rows]}, checked.rows)

        words = [[tokens(caption(digit, *form)) for form in product(*self.fields())] for digit in range(10)]
        return DataSet(
            kind="pairs",
            train=pairs(shown, train),
            test=pairs(hidden, test),
            classes=tuple(map(str, range(10))),
            facts={**facts, "vocabulary": vocabulary(), "class_tokens": torch.tensor(words)},
        )

    def fields(self) -> tuple[tuple[int, ...], ...]:
        """Return what may be drawn for an image: row, column, tone, and which of the tone's words."""
        place = (0, 1) if self.config.places else (2,)
        return place, place, (0, 1) if self.config.tones else (0,), (0, 1)

    def composed(self, images: Tensor, labels: Any, seed: int) -> tuple[Tensor, Tensor]:
        """Return canvases ``(n, 1, 16, 16)`` and the tokens of their captions."""
        count = len(images)
        generator = seeding.torch_generator(seed, "captioned-digits")
        drawn = []
        for field in (*self.fields(), tuple(range(len(TEMPLATES)))):
            choice = torch.randint(len(field), (count,), generator=generator).tolist()
            drawn.append([field[number] for number in choice])
        canvases, captions = torch.zeros(count, 1, 16, 16), []
        for n, (row, column, tone, word, template) in enumerate(zip(*drawn, strict=True)):
            down, right = OFFSETS[row], OFFSETS[column]
            canvases[n, 0, down : down + 8, right : right + 8] = images[n] * (1.0, 0.4)[tone]
            captions.append(tokens(caption(int(labels[n]), row, column, tone, word, template)))
        return canvases, torch.tensor(captions)
