"""Axes and a plotting area as inline SVG.

Why not a plotting library: the page follows the reader's light or dark scheme and fits a phone, so colours
and type must come from the page's style sheet, element by element. That is what classes on plain SVG give,
in a few KB per chart and with the same bytes on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Format = Callable[[float], str]

WIDTH = 460
"""Width of every chart in user units; about its width in pixels, so that type keeps its size."""


@dataclass(frozen=True)
class Axis:
    """A linear axis: the values at its ends, its ticks, its label and how a tick is written."""

    low: float
    high: float
    ticks: tuple[float, ...]
    label: str
    format: Format

    @classmethod
    def over(
        cls,
        values: Iterable[float],
        label: str,
        format: Format,
        *,
        zero: bool = False,
        within: tuple[float, float] | None = None,
        snug: bool = False,
        most: int = 5,
        whole: bool = False,
    ) -> Axis:
        """Make an axis that holds the values, with ticks at round numbers.

        Args:
            values: what must fit; infinities and NaN are passed over.
            zero: start at zero.
            within: never reach beyond these, e.g. 0 and 1 for a share.
            snug: end at the values rather than at the next ticks.
            most: at most about this many steps.
            whole: ticks at whole numbers only.
        """
        finite = [value for value in values if math.isfinite(value)]
        low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
        low = 0.0 if zero else low
        if high <= low:
            margin = abs(low) * 0.1 or 0.5
            low, high = (low, low + margin) if zero else (low - margin, high + margin)
        step = nice((high - low) / most)
        step = max(1.0, step) if whole else step
        if not snug:
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        if within is not None:
            low, high = max(low, within[0]), min(high, within[1])
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        ticks = tuple(round(index * step, 12) for index in range(first, last + 1))
        return cls(low, high, ticks, label, format)

    def place(self, value: float) -> float:
        """Return where a value lies between the ends, as 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def nice(step: float) -> float:
    """Return the smallest of 1, 2, 2.5, 5, 10 times a power of ten that is not below ``step``."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power >= step * (1 - 1e-9))


@dataclass(frozen=True)
class Frame:
    """The plotting area between two axes, and how values fall onto it."""

    x: Axis
    y: Axis
    height: int = 250
    left: int = 48
    right: int = 12
    top: int = 22
    bottom: int = 38

    def at_x(self, value: float) -> float:
        return self.left + self.x.place(value) * (WIDTH - self.left - self.right)

    def at_y(self, value: float) -> float:
        return self.height - self.bottom - self.y.place(value) * (self.height - self.top - self.bottom)

    def points(self, pairs: Iterable[tuple[float, float]]) -> str:
        """Return pairs of values as the ``points`` of a polyline."""
        return " ".join(f"{c(self.at_x(x))},{c(self.at_y(y))}" for x, y in pairs)

    def axes(self) -> list[str]:
        """Return grid lines, tick labels and axis labels."""
        parts = []
        base, end = self.height - self.bottom, WIDTH - self.right
        for tick in self.y.ticks:
            y = c(self.at_y(tick))
            parts.append(f'<line class="grid" x1="{self.left}" x2="{end}" y1="{y}" y2="{y}"/>')
            parts.append(text(self.left - 7, float(y) + 4, self.y.format(tick), "tick end"))
        for tick in self.x.ticks:
            x = c(self.at_x(tick))
            parts.append(f'<line class="tickmark" x1="{x}" x2="{x}" y1="{base}" y2="{base + 4}"/>')
            parts.append(text(float(x), base + 17, self.x.format(tick), "tick middle"))
        parts.append(f'<line class="axis" x1="{self.left}" x2="{end}" y1="{base}" y2="{base}"/>')
        if self.y.label:
            parts.append(text(4, 11, self.y.label, "label"))
        parts.append(text(end, self.height - 4, self.x.label, "label end"))
        return parts


def c(coordinate: float) -> str:
    """Return a coordinate to a tenth of a pixel, without a trailing zero."""
    return f"{coordinate:.1f}".removesuffix(".0")


def text(x: float, y: float, content: str, classes: str) -> str:
    return f'<text class="{classes}" x="{c(x)}" y="{c(y)}">{escape(content)}</text>'


def titled(shape: str, title: str) -> str:
    """Return a self-closed shape with a tooltip."""
    assert shape.endswith("/>"), shape
    return f"{shape[:-2]}><title>{escape(title)}</title></{shape[1:].split(' ', 1)[0]}>"


def picture(label: str, height: float, parts: Sequence[str]) -> Markup:
    """Return the whole ``svg`` element. ``label`` is what a screen reader says in its place."""
    return Markup('<svg class="chart" role="img" viewBox="0 0 {} {}" aria-label="{}">{}</svg>').format(
        WIDTH, c(height), label, Markup("".join(parts))
    )
