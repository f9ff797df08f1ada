"""What federated reconnaissance claims, measured: accuracy over all classes against the number of classes learnt.

    python benchmarks/claims_reconnaissance.py

Runs ``scenarios/cloud/reconnaissance.yaml`` - prototypes, and three yardsticks - and prints one table by missions and
one of costs, both as they stand in docs/methods/reconnaissance.md, and whether the claim holds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from trellis import experiment, flower, scenario
from trellis.report import charts
from trellis.report.charts import Line
from trellis.runs import Run, read_lines

FILE = Path(__file__).resolve().parents[1] / "scenarios" / "cloud" / "reconnaissance.yaml"
RESULTS = Path(__file__).parent / "results" / "claims_reconnaissance.json"
LEAST_AHEAD = 0.20
"""Points of accuracy, as a share, by which prototypes must be ahead of averaged gradients at the end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="write all figures there")
    parser.add_argument("--figure", type=Path, help="draw accuracy against classes learnt there, as SVG")
    parser.add_argument("--from-json", type=Path, help="take the figures of an earlier run instead of running")
    parser.add_argument("--set", action="append", default=[], help="change a key of the scenario")
    options = parser.parse_args()
    result = json.loads(options.from_json.read_text()) if options.from_json else measured(options.set)
    variants = result["variants"]
    print(curve(variants))
    print(costs(variants))
    ahead = 100 * result["ahead"]
    print(f"prototypes are {ahead:.1f} points ahead of averaged gradients; claimed are {100 * LEAST_AHEAD:.0f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.figure:
        options.figure.write_text(figure(variants))
    if result["ahead"] < LEAST_AHEAD:
        raise SystemExit("the claim does not hold")


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


if __name__ == "__main__":
    main()
