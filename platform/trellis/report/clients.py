"""What the page says of single clients: how well the model suits each, what each holds, and what failed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from trellis.report import charts, figures, reading, units
from trellis.report.charts import Dot
from trellis.report.figures import Series
from trellis.report.reading import Cell, Failure

Section = dict[str, Any]
FEW_SERIES, MAX_NAMES = 4, 12
MAX_FAILURES = 50


def clients(series: Sequence[Series], main: str) -> Section | None:
    """Return how the last federated evaluation fell out over clients, and who fared worst."""
    names = list(
        dict.fromkeys(
            name
            for each in series
            for cell in each.cells
            for metrics in cell.evaluated.values()
            for name in metrics
            if name not in reading.COUNTS
        )
    )
    if not names:
        return None
    name = main if main in names else next((n for n in names if not n.endswith("loss")), names[0])
    low = figures.lower_is_better((cell for each in series for cell in each.cells), name)
    worst_first = -1 if low else 1
    most = MAX_NAMES if len(series) <= FEW_SERIES else 4
    dots, rows = [], []
    for index, each in enumerate(series):
        values = [
            (metrics[name], f"client {client}" + (f" (seed {cell.seed})" if len(each.cells) > 1 else ""))
            for cell in each.cells
            for client, metrics in cell.evaluated.items()
            if reading.finite(metrics.get(name)) is not None
        ]
        values.sort(key=lambda pair: worst_first * pair[0])
        dots.append((each.label, [Dot(v, f"{each.label}, {who}: {units.metric(name, v)}") for v, who in values]))
        if not values:
            continue
        worst = values[: max(1, round(len(values) / 10))]
        spread = figures.spread(value for value, _ in values)
        assert spread is not None
        rows.append(
            {
                "slot": charts.slot(index),
                "label": each.label,
                "mean": units.plus_minus(name, spread.mean, spread.sd),
                "worst": units.metric(name, float(np.mean([value for value, _ in worst]))),
                "names": [f"{who} {units.metric(name, value, 1)}" for value, who in worst[:most]],
                "more": max(len(worst) - most, 0),
            }
        )
    rounds = sorted({c.evaluated_round for s in series for c in s.cells if c.evaluated_round is not None})
    chart = charts.distribution(
        dots,
        f"{name} of every client, sorted: "
        + "; ".join(f"{row['label']} {row['mean']}, worst tenth {row['worst']}" for row in rows),
        y=name,
        y_format=(lambda v: units.percent(v, 0)) if units.is_share(name) else (lambda v: units.number(v, 3)),
        share=units.is_share(name),
    )
    return {
        "name": name,
        "rounds": rounds,
        "chart": chart,
        "rows": rows,
        "worst_at": "right" if low else "left",
        "several_seeds": any(len(each.cells) > 1 for each in series),
    }


def partitions(series: Sequence[Series]) -> Section | None:
    """Return a picture of each distinct partition among the variants' first seeds."""
    groups: list[tuple[Cell, list[str]]] = []
    for each in series:
        cell = next((cell for cell in each.cells if cell.partition), None)
        if cell is None or cell.partition is None:
            continue
        for other, labels in groups:
            assert other.partition is not None
            if np.array_equal(other.partition.counts, cell.partition.counts):
                labels.append(each.label)
                break
        else:
            groups.append((cell, [each.label]))
    if not groups:
        return None
    pictures = []
    for cell, labels in groups[: charts.MAX_PICTURES]:
        partition = cell.partition
        assert partition is not None
        sizes = partition.sizes
        counts, classes = partition.counts, partition.classes or ("all",) * partition.counts.shape[1]
        label = (
            f"Examples per client and class: {len(sizes)} clients hold {sizes.min()} to {sizes.max()} examples each."
        )
        fits = counts.shape[0] <= charts.MAX_BUBBLES[0] and counts.shape[1] <= charts.MAX_BUBBLES[1]
        pictures.append(
            {
                "title": ", ".join(labels) if len(groups) > 1 else "",
                "seed": cell.seed,
                "chart": (charts.bubbles if fits else charts.heat)(counts, classes, label),
                "heat": not fits,
                "clients": f"{len(sizes):,}",
                "classes": len(partition.classes),
                "held": f"{sizes.sum():,}",
                "least": f"{sizes.min():,}",
                "median": f"{np.median(sizes):,.1f}".removesuffix(".0"),
                "most": f"{sizes.max():,}",
                "per_client": units.number(float((counts > 0).sum(axis=1).mean()), 2),
            }
        )
    return {"pictures": pictures, "hidden": len(groups) - len(pictures)}


def failures(cells: Sequence[Cell]) -> Section | None:
    """Return failures and refusals by client and reason, most frequent first."""
    every = [(cell, failure) for cell in cells for failure in cell.failures]
    if not every:
        return None
    rounds: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for _, each in every:
        rounds[each.client, each.phase, each.reason].append(each.round)
    order = sorted(rounds, key=lambda key: (-len(rounds[key]), _natural(key[0]), key))
    asked = sum(reading.finite(row.get("cohort")) or 0 for cell in cells for row in cell.rounds)
    return {
        "count": len(every),
        "train": _of_training([failure for _, failure in every]),
        "asked": f"{asked:,.0f}" if asked else "",
        "clients": len({each.client for _, each in every}),
        "rows": [(*key, len(rounds[key]), ranges(rounds[key])) for key in order[:MAX_FAILURES]],
        "more": max(len(order) - MAX_FAILURES, 0),
    }


def _of_training(every: Sequence[Failure]) -> int:
    return Counter(each.phase for each in every)["train"]


def _natural(client: str) -> tuple[int, str]:
    return (int(client) if client.isdecimal() else 2**63, client)


def ranges(rounds: Sequence[int], most: int = 6) -> str:
    """Return round numbers as ``1, 3–5, 9``; of many pieces only the first."""
    pieces: list[list[int]] = []
    for index in sorted(set(rounds)):
        if pieces and index == pieces[-1][-1] + 1:
            pieces[-1] = [pieces[-1][0], index]
        else:
            pieces.append([index])
    written = [f"{piece[0]}–{piece[-1]}" if len(piece) > 1 else str(piece[0]) for piece in pieces]
    return ", ".join(written[:most]) + (", …" if len(written) > most else "")
