"""The charts of the page. Each function takes plain numbers and returns one ``svg`` element.

Colours are classes: ``s0`` to ``s6`` for series and phases, ``rest`` for grey. The style sheet gives them
the Okabe-Ito colours, which people with any common colour blindness can tell apart, for light and dark.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from trellis.report.figures import thin
from trellis.report.svg import WIDTH, Axis, Format, Frame, c, picture, text, titled
from trellis.report.units import number

COLOURS = 7
MAX_TIPS = 60
MAX_PICTURES = 4
MAX_COLUMNS = 100
MAX_BUBBLES = (40, 24)
"""Clients and classes up to which a partition is drawn as bubbles; beyond, as a heat map."""
MAX_PIXELS = (1000, 200)


@dataclass(frozen=True)
class Line:
    """One line: points ``(x, y)`` in order of x, and where there is a spread the band ``(x, low, high)``."""

    label: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Dot:
    """One value of a sorted distribution, with its tooltip."""

    value: float
    title: str


def slot(index: int) -> str:
    """Return the classes of the ``index``-th colour; after seven, the same colours dashed."""
    return f"s{index % COLOURS}" + (" dashed" if index >= COLOURS else "")


def lines(
    series: Sequence[Line],
    label: str,
    *,
    x: str,
    y: str,
    x_format: Format,
    y_format: Format,
    tip_format: Format | None = None,
    share: bool = False,
    zero: bool = False,
    whole: bool = False,
) -> Markup:
    """Draw lines with bands. Values that are not finite leave a gap at their place.

    ``share`` keeps the y axis within 0 and 1; ``zero`` starts it at zero; ``whole`` asks for whole ticks on x.
    """
    every_x = [point[0] for line in series for point in line.points]
    every_y = [point[1] for line in series for point in line.points]
    every_y += [edge for line in series for point in line.band for edge in point[1:]]
    frame = Frame(
        Axis.over(every_x, x, x_format, snug=True, whole=whole),
        Axis.over(every_y, y, y_format, within=(0.0, 1.0) if share else None, zero=zero, most=4),
    )
    parts = frame.axes()
    for index, line in enumerate(series):
        band = [(a, low, high) for a, low, high in thin(line.band) if math.isfinite(low) and math.isfinite(high)]
        if band:
            outline = [(a, high) for a, _, high in band] + [(a, low) for a, low, _ in reversed(band)]
            parts.append(f'<polygon class="band {slot(index)}" points="{frame.points(outline)}"/>')
    for index, line in enumerate(series):
        for piece in _finite_pieces(thin(line.points)):
            if len(piece) > 1:
                parts.append(f'<polyline class="line {slot(index)}" points="{frame.points(piece)}"/>')
            else:
                place = f'cx="{c(frame.at_x(piece[0][0]))}" cy="{c(frame.at_y(piece[0][1]))}"'
                parts.append(f'<circle class="dot {slot(index)}" r="3" {place}/>')
    for index, line in enumerate(series):
        for a, b in thin([point for point in line.points if math.isfinite(point[1])], MAX_TIPS):
            circle = f'<circle class="tip {slot(index)}" r="5" cx="{c(frame.at_x(a))}" cy="{c(frame.at_y(b))}"/>'
            parts.append(titled(circle, f"{line.label}: {(tip_format or y_format)(b)} at {x_format(a)} ({x})"))
    return picture(label, frame.height, parts)


def distribution(
    series: Sequence[tuple[str, Sequence[Dot]]], label: str, *, y: str, y_format: Format, share: bool = False
) -> Markup:
    """Draw each series' values sorted, lowest left, over their rank from 0 to 100 %."""
    every = [dot.value for _, dots in series for dot in dots]
    frame = Frame(
        Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0), "clients, sorted", lambda rank: f"{100 * rank:.0f} %"),
        Axis.over(every, y, y_format, within=(0.0, 1.0) if share else None, most=4),
        right=16,
    )
    tenth = c(frame.at_x(0.1))
    base = frame.height - frame.bottom
    parts = frame.axes()
    parts.append(f'<line class="mark" x1="{tenth}" x2="{tenth}" y1="{frame.top}" y2="{base}"/>')
    for index, (_, dots) in enumerate(series):
        ordered = sorted(dots, key=lambda dot: dot.value)
        count = len(ordered)
        radius = 3 if count <= 120 else 2
        for rank, dot in thin([((i + 0.5) / count, dot) for i, dot in enumerate(ordered)]):
            place = f'cx="{c(frame.at_x(rank))}" cy="{c(frame.at_y(dot.value))}"'
            parts.append(titled(f'<circle class="dot {slot(index)}" r="{radius}" {place}/>', dot.title))
    return picture(label, frame.height, parts)


def columns(
    stacks: Sequence[tuple[str, Sequence[tuple[str, float]]]],
    classes: dict[str, str],
    label: str,
    *,
    y: str,
    y_format: Format,
    top: float,
) -> Markup:
    """Draw stacked columns, each ``(name, [(part, value), ...])``.

    ``classes`` gives each part's colour; ``top`` is the highest value of the axis, so that several such
    charts share one scale. Columns are at most 100: callers group rounds, named ``16–30``, and the first is the label.
    """
    assert len(stacks) <= MAX_COLUMNS, len(stacks)
    count = max(len(stacks), 1)
    frame = Frame(
        Axis(0.0, float(count), (), "round", str), Axis.over([top], y, y_format, zero=True, most=3), height=170
    )
    parts = frame.axes()
    width = (WIDTH - frame.left - frame.right) / count
    gap = min(3.0, width * 0.2)
    every = math.ceil(count / 10)
    for index, (name, values) in enumerate(stacks):
        x, base = frame.at_x(index), 0.0
        for part, height in values:
            upper, lower = frame.at_y(base + height), frame.at_y(base)
            base += height
            if lower - upper < 0.05:
                continue
            size = f'width="{c(width - gap)}" height="{lower - upper:.2f}"'
            bar = f'<rect class="{classes[part]}" x="{c(x + gap / 2)}" y="{upper:.2f}" {size}/>'
            parts.append(titled(bar, f"round {name}: {part} {y_format(height)}"))
        if index % every == 0:
            parts.append(text(x + width / 2, frame.height - frame.bottom + 17, name.split("–")[0], "tick middle"))
    return picture(label, frame.height, parts)


def bubbles(counts: NDArray[np.int64], classes: Sequence[str], label: str) -> Markup:
    """Draw examples per client (left to right) and class (top to bottom) as circles whose area is the count."""
    clients, rows = counts.shape
    left, top = 14 + min(7 * max(len(_short(name)) for name in classes), 90), 50
    cell = min((WIDTH - left - 6) / clients, 24.0)
    height = top + rows * cell + 12
    most, largest = max(int(counts.max()), 1), max(int(counts.sum(axis=1).max()), 1)
    parts = [text(4, 11, "examples in all, then by class", "label")]
    every = math.ceil(clients * 8 * len(str(clients)) / (clients * cell))
    for client in range(clients):
        x = left + (client + 0.5) * cell
        total = int(counts[client].sum())
        bar = 22 * total / largest
        place = f'x="{c(x - cell * 0.32)}" y="{c(top - 9 - bar)}" width="{c(cell * 0.64)}" height="{c(bar)}"'
        parts.append(titled(f'<rect class="total" {place}/>', f"client {client}: {total:,} examples"))
        if client % every == 0:
            parts.append(text(x, height, str(client), "tick middle"))
        for row in range(rows):
            n = int(counts[client, row])
            if n:
                radius = max(0.47 * cell * math.sqrt(n / most), 0.7)
                circle = f'<circle class="bubble" r="{radius:.2f}" cx="{c(x)}" cy="{c(top + (row + 0.5) * cell)}"/>'
                parts.append(titled(circle, f"client {client}, class {classes[row]}: {n:,} examples"))
    for row, name in enumerate(classes):
        parts.append(text(left - 6, top + (row + 0.5) * cell + 4, _short(name), "tick end"))
    parts.append(text(WIDTH - 6, height + 17, "client", "label end"))
    return picture(label, height + 21, parts)


def heat(counts: NDArray[np.int64], classes: Sequence[str], label: str) -> Markup:
    """Draw examples per client and class as a heat map with classes across, for many clients or classes.

    Clients are sorted by their mean class, so that a skew shows as a diagonal. Beyond 1,000 clients (or 200
    classes) neighbours share a row (a column) as their mean.
    """
    from PIL import Image

    weights = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    order = np.argsort(weights @ np.arange(counts.shape[1]), kind="stable")
    pooled = _pool(_pool(counts[order].astype(np.float64), MAX_PIXELS[0]).T, MAX_PIXELS[1]).T
    most = pooled.max() or 1.0
    # One ink with more or less opacity: the page's background shows through, light or dark.
    pixels = np.zeros((*pooled.shape, 4), dtype=np.uint8)
    pixels[..., :3] = (45, 135, 200)
    pixels[..., 3] = np.rint(255 * np.sqrt(pooled / most))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    left, top, width, height = 48, 22, WIDTH - 48 - 12, 250
    step = math.ceil(len(classes) / 12)
    parts = [
        text(4, 11, f"{len(counts):,} clients, by mean class", "label"),
        f'<image class="heat" x="{left}" y="{top}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>',
        f'<rect class="outline" x="{left}" y="{top}" width="{width}" height="{height}"/>',
    ]
    for index in range(0, len(classes), step):
        x = left + (index + 0.5) * width / len(classes)
        parts.append(text(x, top + height + 17, _short(classes[index], 5), "tick middle"))
    parts.append(text(left - 7, top + 10, "1", "tick end"))
    parts.append(text(left - 7, top + height, f"{len(counts):,}", "tick end"))
    parts.append(
        text(left + width, top + height + 34, f"class (darkest: {number(float(most), 3)} examples)", "label end")
    )
    return picture(label, top + height + 38, parts)


def _pool(values: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    """Average neighbouring rows until at most ``most`` are left."""
    if len(values) <= most:
        return values
    return np.stack([part.mean(axis=0) for part in np.array_split(values, most)])


def _finite_pieces(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _short(name: str, most: int = 13) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
