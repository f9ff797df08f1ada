"""What federated reconnaissance claims, measured: accuracy over all classes against the number of classes learnt.

Runs ``scenarios/cloud/reconnaissance.yaml`` - prototypes, and three yardsticks - and prints one table by missions and
one of costs, both as they stand in docs/methods/reconnaissance.md.

    python benchmarks/claims federated-reconnaissance
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common import Claim

from trellis import experiment, flower, scenario
from trellis.report import charts
from trellis.report.charts import Line
from trellis.runs import Run, read_lines

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "scenarios" / "cloud" / "reconnaissance.yaml"
FIGURE = ROOT / "docs" / "methods" / "reconnaissance.svg"
LEAST_AHEAD = 0.20
"""Points of accuracy, as a share, by which prototypes must be ahead of averaged gradients at the end."""


def measure(seeds: int = 3) -> tuple[list[Claim], dict[str, Any]]:
    """Run the scenario, draw the figure of its page, and judge; the details are means over seeds by variant."""
    result = measured([f"seeds={list(range(seeds))}"])
    print(curve(result["variants"]))
    print(costs(result["variants"]))
    FIGURE.write_text(figure(result["variants"]))
    return judge(result), result


def judge(result: dict[str, Any]) -> list[Claim]:
    """Return the claims with their outcome: far ahead of averaged gradients, and of replay at a small upload."""
    last = {name: each["missions"][-1] for name, each in result["variants"].items()}
    said = {name: f"{100 * row['accuracy']:.1f} ± {100 * row['sd']:.1f} %" for name, row in last.items()}
    ahead, of_replay = result["ahead"], last["protonet"]["accuracy"] - last["icarl"]["accuracy"]
    cheaper = result["variants"]["icarl"]["bytes_per_class"] / result["variants"]["protonet"]["bytes_per_class"]
    return [
        Claim(
            f"prototypes end at least {100 * LEAST_AHEAD:.0f} points ahead of averaged gradients",
            "federated averaging of gradients (lower bound)",
            f"{said['protonet']} against {said['gradient']}, joint training {said['joint']}",
            "held" if ahead >= LEAST_AHEAD else "not held",
        ),
        Claim(
            "prototypes are ahead of replay (iCaRL)",
            "iCaRL extended to many clients",
            f"{said['protonet']} against {said['icarl']}, at 1/{cheaper:.0f} of the upload",
            "held" if of_replay > 0 else "not held",
            "" if of_replay > 0 else "With as few classes as here the exemplars hold most of what is to be remembered.",
        ),
    ]


def measured(overrides: list[str]) -> dict[str, Any]:
    """Run the scenario and return its figures: means over seeds by variant, and how far prototypes are ahead."""
    flower.quiet()
    loaded = scenario.load(FILE, overrides)
    with tempfile.TemporaryDirectory() as folder:
        current = Run.create(Path(folder), loaded)
        outcome = experiment.execute(current)
        if outcome.failed:
            raise SystemExit(str(outcome.failed))
        figures = {
            variant: [cell(current.path / "cells" / f"{variant}-seed{seed}") for seed in loaded.seeds]
            for variant in loaded.variants
        }
    result = {variant: summary(cells) for variant, cells in figures.items()}
    last = {variant: each["missions"][-1]["accuracy"] for variant, each in result.items()}
    return {"seeds": list(loaded.seeds), "ahead": last["protonet"] - last["gradient"], "variants": result}


def cell(folder: Path) -> dict[str, Any]:
    """Return the figures of one seed."""
    lines = read_lines(folder / "metrics.jsonl")[1:]
    replies = [row for row in read_lines(folder / "clients.jsonl") if row["phase"] == "train" and row["ok"]]
    return {
        "missions": [
            {
                "classes": line["central"]["classes"],
                **{name: line["central"].get(name) for name in ("accuracy", "accuracy-base", "accuracy-field")},
                "own": (line["federated"] or {}).get("accuracy-own"),
            }
            for line in lines
        ],
        "bytes_per_class": sum(r["bytes_up"] for r in replies) / sum(r["metrics"]["classes"] for r in replies),
        "client_seconds": mean(row["seconds"] for row in replies),
        "cloud_seconds": mean(line["phases"].get("aggregate", 0.0) for line in lines[1:]),
        "base_seconds": lines[0]["phases"]["aggregate"],
    }


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over seeds, and the standard deviation of accuracy."""
    missions = []
    for rows in zip(*(each["missions"] for each in cells), strict=True):
        known = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
        line = {name: mean(values) if values else None for name, values in known.items()}
        spread = stdev(known["accuracy"]) if len(cells) > 1 else 0.0
        missions.append({**line, "sd": spread})
    costs = ("bytes_per_class", "client_seconds", "cloud_seconds", "base_seconds")
    return {"missions": missions, **{name: mean(each[name] for each in cells) for name in costs}}


def curve(result: dict[str, Any]) -> str:
    """Return accuracy over all classes learnt so far, one line a mission."""
    lines = [f"| after mission | classes learnt | {' | '.join(result)} |", "|---" * (2 + len(result)) + "|"]
    rows = zip(*(each["missions"] for each in result.values()), strict=True)
    for number, row in enumerate(rows):
        values = " | ".join(f"{100 * each['accuracy']:.1f} ± {100 * each['sd']:.1f}" for each in row)
        lines.append(f"| {number or 'base'} | {row[0]['classes']:.1f} | {values} |")
    return "\n".join(lines) + "\n"


def costs(result: dict[str, Any]) -> str:
    """Return the last mission's accuracies by groups, and what a mission costs."""
    names = ("accuracy", "base", "field", "own", "bytes up per class and client", "client s", "cloud s")
    lines = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for variant, each in result.items():
        last = each["missions"][-1]
        shares = (last["accuracy"], last["accuracy-base"], last["accuracy-field"], last["own"])
        values = " | ".join("-" if share is None else f"{100 * share:.1f}" for share in shares)
        size, client, cloud = each["bytes_per_class"], each["client_seconds"], each["cloud_seconds"]
        lines.append(f"| {variant} | {values} | {size:,.0f} | {client:.2f} | {cloud:.2f} |")
    return "\n".join(lines) + "\n"


STYLE = """
svg { font: 11px system-ui, sans-serif; background: #fff; } text { fill: #555; }
line { stroke: #ddd; } line.axis, line.tickmark { stroke: #999; }
.line { fill: none; stroke: var(--c); stroke-width: 2; }
.band { fill: var(--c); fill-opacity: 0.15; } .tip { fill: none; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.s0 { --c: #0072b2; } .s1 { --c: #d55e00; } .s2 { --c: #009e73; } .s3 { --c: #b8578f; } .key { fill: var(--c); }
"""


def figure(result: dict[str, Any]) -> str:
    """Draw accuracy over all classes learnt so far, by the report's own charts, with a legend."""
    lines = []
    for variant, each in result.items():
        rows = {row["classes"]: row for row in each["missions"]}  # of missions that added no class, the last
        points = [(classes, row["accuracy"]) for classes, row in rows.items()]
        band = [(classes, row["accuracy"] - row["sd"], row["accuracy"] + row["sd"]) for classes, row in rows.items()]
        lines.append(Line(variant, points, band))
    svg = charts.lines(
        lines,
        "Accuracy over all classes learnt so far",
        x="classes learnt so far",
        y="accuracy, mean and deviation of the seeds",
        x_format=lambda value: f"{value:.0f}",
        y_format=lambda value: f"{100 * value:.0f} %",
        share=True,
        zero=True,
    )
    legend = "".join(
        f'<text class="key {charts.slot(index)}" x="{60 + 90 * index}" y="26">{line.label}</text>'
        for index, line in enumerate(lines)
    )
    text = str(svg).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return text.replace(">", f"><style>{STYLE}</style>", 1).replace("</svg>", f"{legend}</svg>")
