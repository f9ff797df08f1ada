"""The report reads any run's folder, computes what numpy computes, and writes one closed page."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from report_runs import make_run, write_lines
from trellis import report
from trellis.errors import RunError
from trellis.report import charts, clients, figures, page, reading, units
from trellis.report.svg import Axis

HOSTILE = "<script>alert(1)</script>"


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def pictures(html: str) -> list[ElementTree.Element]:
    """Return every chart; parsing fails where one is not well-formed."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Reading


def test_reads_cells_in_the_scenarios_order_and_seeds_as_numbers(tmp_path: Path) -> None:
    run = reading.read(make_run(tmp_path / "run", variants=("zeta", "alpha"), seeds=(10, 2)))
    assert run.variants == ["zeta", "alpha"]
    assert [(cell.variant, cell.seed) for cell in run.cells if cell.variant == "zeta"] == [("zeta", 2), ("zeta", 10)]
    assert run.problems == ()


def test_a_line_cut_short_by_a_crash_is_left_out_and_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", variants=(), seeds=(0,), rounds=5)
    path = folder / "cells/main-seed0/metrics.jsonl"
    path.write_text(path.read_text()[:-40])
    run = reading.read(folder)
    assert [row["round"] for row in run.cells[0].rounds] == [0, 1, 2, 3, 4]
    assert run.problems == ("cells/main-seed0/metrics.jsonl: the last line is cut short; it is left out",)
    assert "the last line is cut short" in text_of(report.build(folder))


def test_damage_in_the_middle_is_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", variants=(), seeds=(0,), rounds=5)
    path = folder / "cells/main-seed0/metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1], lines[3] = b"\xff\xfe", b"[1, 2]"
    path.write_bytes(b"\n".join(lines) + b"\n")
    run = reading.read(folder)
    assert [row["round"] for row in run.cells[0].rounds] == [0, 2, 4, 5]
    assert "2 of 6 lines are not readable, the first is line 2" in run.problems[0]


def test_a_round_written_twice_counts_once_as_last_written(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", variants=(), seeds=(0,), rounds=3)
    path = folder / "cells/main-seed0/metrics.jsonl"
    again = json.loads(path.read_text().splitlines()[2]) | {"seconds": 99.0}
    path.write_text(path.read_text() + json.dumps(again) + "\n")
    cell = reading.read(folder).cells[0]
    assert [row["round"] for row in cell.rounds] == [0, 1, 2, 3]
    assert cell.rounds[2]["seconds"] == 99.0


def test_only_the_last_evaluation_and_all_failures_are_kept_of_the_replies(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", variants=(), seeds=(0,), rounds=3, clients=4)
    refused = {"round": 1, "phase": "train", "client": 3, "ok": False, "reason": "NaN in 'w'"}
    with (folder / "cells/main-seed0/clients.jsonl").open("a") as file:
        file.write(json.dumps(refused) + "\n")
    cell = reading.read(folder).cells[0]
    assert cell.evaluated_round == 3
    assert sorted(cell.evaluated) == ["0", "1", "2", "3"]
    assert {(f.round, f.client, f.reason) for f in cell.failures} == {
        (2, "4", "update norm 14 times the median"),
        (1, "3", "NaN in 'w'"),
    }


def test_a_failure_named_in_both_files_counts_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", variants=(), seeds=(0,))
    same = {"round": 2, "phase": "train", "client": 4, "ok": False, "reason": "update norm 14 times the median"}
    with (folder / "cells/main-seed0/clients.jsonl").open("a") as file:
        file.write(json.dumps(same) + "\n")
    assert len(reading.read(folder).cells[0].failures) == 1


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "nothing"
    if make:
        folder.mkdir()
    with pytest.raises(RunError) as caught:
        report.build(folder)
    assert caught.value.code == "run-missing"
    assert "nothing" in str(caught.value)


@pytest.mark.parametrize(
    "counts", [[], [[1, 2], [3]], [["a"]], [[-1, 2, 3]], [[1, 2]], None, [[10**30, 1, 1]]], ids=str
)
def test_a_partition_that_is_none_is_said(tmp_path: Path, counts: object) -> None:
    folder = make_run(tmp_path / "run", variants=(), seeds=(0,), classes=3)
    edit(folder / "cells/main-seed0/partition.json", counts=counts)
    run = reading.read(folder)
    assert run.cells[0].partition is None
    assert "not readable as a partition" in run.problems[0]
    assert "No partition was recorded" in text_of(report.build(folder))


# Arithmetic


def test_spread_is_numpys_mean_and_sample_deviation() -> None:
    data = np.random.default_rng(3).normal(5, 2, 17)
    spread = figures.spread([*data, None])
    assert spread is not None
    assert spread.mean == pytest.approx(np.mean(data), rel=1e-15)
    assert spread.sd == pytest.approx(np.sqrt(np.sum((data - np.mean(data)) ** 2) / 16), rel=1e-12)
    assert (spread.low, spread.high, spread.count) == (data.min(), data.max(), 17)


def test_spread_of_one_value_has_no_deviation_and_of_none_is_none() -> None:
    assert figures.spread([0.5]) == figures.Spread(0.5, None, 0.5, 0.5, 1)
    assert figures.spread([None]) is None


def test_a_diverged_seed_does_not_vanish_in_the_mean() -> None:
    spread = figures.spread([0.9, float("nan")])
    assert spread is not None
    assert not np.isfinite(spread.mean)
    assert units.plus_minus("accuracy", spread.mean, spread.sd) == units.NOT_FINITE


def test_curves_are_means_over_seeds_at_each_round(tmp_path: Path) -> None:
    run = reading.read(make_run(tmp_path / "run", variants=(), seeds=(0, 1, 2), rounds=4))
    scores = np.array([[row["central"]["accuracy"] for row in cell.rounds] for cell in run.cells])
    curve = figures.curve(run.cells, lambda row: figures.value(row, "central", "accuracy"))
    assert [index for index, _ in curve] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose([spread.mean for _, spread in curve], scores.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose([spread.sd for _, spread in curve], scores.std(axis=0, ddof=1), rtol=1e-12)
    np.testing.assert_array_equal([spread.low for _, spread in curve], scores.min(axis=0))
    np.testing.assert_array_equal([spread.high for _, spread in curve], scores.max(axis=0))


def test_bytes_add_up_also_over_rounds_without_an_evaluation(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", variants=(), seeds=(0,), rounds=4, clients=2)
    path = folder / "cells/main-seed0/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [row | ({"central": None} if row["round"] % 2 else {}) for row in rows])
    points = figures.against_bytes(reading.read(folder).cells, "central", "accuracy")
    assert [sent for sent, _ in points] == [0, 2 * 3800, 4 * 3800]


def test_phases_and_what_they_leave_unaccounted_add_up_to_the_round() -> None:
    rows = [
        {"round": 1, "seconds": 1.0, "phases": {"train": 0.6, "aggregate": 0.1}},
        {"round": 2, "seconds": 2.0, "phases": {"train": 1.5, "checkpoint": 0.4}},
    ]
    means = figures.mean_phases(rows)
    assert list(means)[-1] == figures.REST
    assert means == pytest.approx({"train": 1.05, "aggregate": 0.05, "checkpoint": 0.2, figures.REST: 0.2})
    assert sum(means.values()) == pytest.approx(1.5)


def test_overhead_is_the_summarys_or_the_probes_median_and_quartiles(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", variants=(), seeds=(0,), rounds=5)
    cell = folder / "cells/main-seed0"
    assert figures.overhead(reading.read(folder).cells[0]) == figures.Overhead(1.05, 1.0, 1.2, 1.01, 3)
    ratios = [1.3, 1.0, 1.1, 1.2, 1.05, 1.4]
    rows = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    write_lines(cell / "metrics.jsonl", [r | {"probe": {"ratio": x}} for r, x in zip(rows, ratios, strict=True)])
    edit(cell / "summary.json", overhead=None)
    found = figures.overhead(reading.read(folder).cells[0])
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    assert found == figures.Overhead(middle, low, high, None, 6)


def test_thinning_keeps_ends_and_order() -> None:
    thinned = figures.thin(range(1501), 400)
    assert (len(thinned), thinned[0], thinned[-1]) == (400, 0, 1500)
    assert thinned == sorted(set(thinned))
    assert figures.thin([1, 2, 3], 400) == [1, 2, 3]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["loss", "macro-f1", "accuracy"], "accuracy"),
        (["loss", "rmse", "mae"], "rmse"),
        (["loss"], "loss"),
    ],
)
def test_the_main_metric(tmp_path: Path, names: list[str], chosen: str) -> None:
    folder = make_run(tmp_path / "run", variants=(), seeds=(0,), rounds=0)
    row = {"round": 0, "central": dict.fromkeys(names, 0.5) | {"num-examples": 4}}
    write_lines(folder / "cells/main-seed0/metrics.jsonl", [row])
    assert figures.main_metric(reading.read(folder).cells) == ("central", chosen)


def test_the_worst_tenth_of_a_loss_are_its_largest(tmp_path: Path) -> None:
    run = reading.read(make_run(tmp_path / "run", variants=(), seeds=(0,), clients=10, metric="rmse"))
    section = clients.clients(figures.series_of(run), "rmse")
    assert section is not None
    assert section["rows"][0]["names"][0].startswith("client 0 ")
    accuracy = reading.read(make_run(tmp_path / "other", variants=(), seeds=(0,), clients=10))
    section = clients.clients(figures.series_of(accuracy), "accuracy")
    assert section is not None
    assert len(section["rows"][0]["names"]) == 1
    assert section["rows"][0]["names"][0].startswith("client 9 ")


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.113, 0.97), (0, 3.8e6), (-2.5, -2.5), (0, 0), (1e-9, 3e-9), (5, 1500)]
)
def test_an_axis_holds_its_values_with_a_few_even_ticks(low: float, high: float) -> None:
    axis = Axis.over([low, high, float("nan")], "", str)
    assert axis.low <= low <= high <= axis.high
    assert 2 <= len(axis.ticks) <= 9
    np.testing.assert_allclose(np.diff(axis.ticks), np.diff(axis.ticks)[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (units.size(999), "999 B"),
        (units.size(999_600), "1 MB"),
        (units.size(11_790_000), "11.8 MB"),
        (units.duration(0.0341), "34.1 ms"),
        (units.duration(104.4), "104 s"),
        (units.duration(1305), "21 min 45 s"),
        (units.duration(7260), "2 h 1 min"),
        (units.percent(0.9379), "93.8 %"),
        (units.number(12345), "12,345"),
        (units.number(0.18891), "0.1889"),
        (units.number(None), "–"),
        (units.plus_minus("accuracy", 0.9379, 0.0194), "93.79 ± 1.94 %"),
        (units.plus_minus("loss", 0.18891, 0.00111), "0.1889 ± 0.0011"),
        (clients.ranges([9, 4, 5, 5, 6]), "4–6, 9"),
    ],
)
def test_numbers_as_people_write_them(written: str, meant: str) -> None:
    assert written.replace("\N{NARROW NO-BREAK SPACE}", " ") == meant


# The page


def test_the_page_says_mean_and_deviation_of_every_variant(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    html = text_of(report.build(folder))
    for variant in ("fedavg", "fedprox"):
        final = [
            json.loads((folder / f"cells/{variant}-seed{seed}/summary.json").read_text())["final"]["central"][
                "accuracy"
            ]
            for seed in (0, 1, 2)
        ]
        assert f"{100 * np.mean(final):.2f}" in html
        assert f"± {100 * np.std(final, ddof=1):.2f} (sd of 3 seeds)" in html
    assert html.count('role="img"') == len(pictures(html)) == 8
    assert "R = 1.06" in html
    assert "4 March 2026, 05:06 UTC" in html


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", clients=60)
    first = report.build(folder).read_bytes()
    assert report.build(folder).read_bytes() == first
    assert sorted(path.name for path in folder.iterdir() if "report" in path.name) == ["report.html"]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", description=HOSTILE, reason=HOSTILE, state="failed", error=HOSTILE)
    for old, new in (("scenario.yaml", "name: digits"), ("environment.json", '"cores"')):
        path = folder / old
        path.write_text(path.read_text().replace(new, {"name: digits": f'name: "{HOSTILE}"'}.get(new, f'"{HOSTILE}"')))
    cell = folder / "cells/fedavg-seed0"
    edit(cell / "partition.json", classes=[HOSTILE, '"><img src=x>', "\ud800"])
    edit(cell / "summary.json", sha256="<b>")
    shutil.move(folder / "cells/fedprox-seed0", folder / f"cells/{HOSTILE.replace('/', '')}-seed0")
    html = text_of(report.build(folder))
    assert "<script" not in html
    assert "<img" not in html
    assert "<b>" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4
    assert pictures(html)


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    html = text_of(report.build(make_run(tmp_path / "run", clients=60)))
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|url\(|@import|<script|<iframe|<object|\son\w+=|\sstyle=", html)
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert sources
    assert all(source.startswith("data:") for source in sources)


def test_a_failed_run_with_hardly_a_file_still_has_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rounds=0, seeds=(0,), state="failed", error="round 1: no quorum [round-quorum]")
    for path in [*folder.rglob("*.jsonl"), *folder.rglob("partition.json"), *folder.rglob("summary.json")]:
        path.unlink()
    html = text_of(report.build(folder))
    assert "round 1: no quorum [round-quorum]" in html
    assert "cells/fedavg-seed0/metrics.jsonl: missing" in html
    for sentence in ("No metric was recorded", "There are no rounds", "No client evaluated", "no round was finished"):
        assert sentence in html


def test_only_a_status_is_enough(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "failed", "error": "out of memory"}')
    html = text_of(report.build(tmp_path))
    assert "out of memory" in html
    assert "scenario.yaml: missing" in html


@pytest.mark.parametrize("source", ["central", "federated"])
def test_a_missing_evaluation_is_said_and_the_other_shown(tmp_path: Path, source: str) -> None:
    folder = make_run(tmp_path / "run", variants=(), seeds=(0,))
    cell = folder / "cells/main-seed0"
    rows = [json.loads(line) | {source: None} for line in (cell / "metrics.jsonl").read_text().splitlines()]
    write_lines(cell / "metrics.jsonl", rows)
    edit(cell / "summary.json", final={})
    html = unescape(text_of(report.build(folder)))
    other = {"central": "federated", "federated": "central"}[source]
    assert f"This run has no {page.SOURCES[source]}" in html
    assert f"Final {other} accuracy" in html


@pytest.mark.parametrize(("every", "why"), [(0, "probe.every is 0"), (20, "no round was replayed")])
def test_an_overhead_that_was_not_measured_has_a_reason(tmp_path: Path, every: int, why: str) -> None:
    folder = make_run(tmp_path / "run", variants=(), seeds=(0,))
    edit(folder / "cells/main-seed0/summary.json", overhead=None)
    path = folder / "scenario.yaml"
    path.write_text(re.sub(r"(?<=probe:\n  every: )\d+", str(every), path.read_text()))
    html = text_of(report.build(folder))
    assert "Not measured" in html
    assert why in html


def test_values_that_are_not_finite_leave_a_gap_and_are_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", variants=(), seeds=(0,), rounds=4)
    cell = folder / "cells/main-seed0"
    rows = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    rows[2]["central"]["accuracy"] = float("nan")
    rows[-1]["central"] = {"accuracy": float("inf"), "loss": float("nan")}
    write_lines(cell / "metrics.jsonl", rows)
    edit(cell / "summary.json", final={})
    html = text_of(report.build(folder))
    assert "not finite" in html
    assert not re.search(r'(?:points|cx|cy|x1|y1)="[^"]*(?:nan|inf)', html)


def test_a_long_run_of_many_clients_stays_a_small_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", variants=(), seeds=(0,), rounds=1500, clients=70)
    report_bytes = report.build(folder).read_bytes()
    assert len((folder / "cells/main-seed0/clients.jsonl").read_text().splitlines()) > 100_000
    assert len(report_bytes) < 500_000
    html = report_bytes.decode()
    longest = max(len(points.split()) for points in re.findall(r'<polyline[^>]*points="([^"]*)"', html))
    assert longest == figures.MAX_POINTS


@pytest.mark.parametrize(("rows", "columns", "heat"), [(20, 10, False), (1000, 10, True), (20, 100, True)])
def test_a_partition_is_drawn_as_bubbles_or_as_a_heat_map(rows: int, columns: int, heat: bool) -> None:
    counts = np.random.default_rng(0).integers(1, 9, (rows, columns))
    partition = reading.Partition(tuple(map(str, range(columns))), counts)
    cell = reading.Cell("main-seed0", "", 0, (), {}, None, (), partition, {})
    section = clients.partitions([figures.Series("main", (cell,))])
    assert section is not None
    (picture,) = pictures(section["pictures"][0]["chart"])
    assert (picture.find("image") is not None) == heat
    assert len(picture.findall("circle")) == (0 if heat else rows * columns)


def test_bubbles_have_areas_in_the_ratio_of_the_counts() -> None:
    (picture,) = pictures(charts.bubbles(np.array([[100, 25]]), ("a", "b"), "two"))
    large, small = (float(circle.attrib["r"]) for circle in picture.findall("circle"))
    assert (large / small) ** 2 == pytest.approx(4, rel=0.01)


def test_columns_stack_to_the_rounds_time() -> None:
    stacks = [("1", [("train", 1.0), ("rest", 0.5)]), ("2", [("train", 2.0), ("rest", 1.0)])]
    chart = charts.columns(stacks, {"train": "s0", "rest": "rest"}, "x", y="s", y_format=str, top=3.0)
    heights = [float(bar.attrib["height"]) for bar in pictures(chart)[0].findall("rect")]
    assert np.array(heights) / heights[0] == pytest.approx([1, 0.5, 2, 1], rel=0.01)


# Several runs


def test_a_comparison_names_only_what_differs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, variants=(), lr=lr) for name, lr in (("one", 0.1), ("two", 0.5))]
    rows = report.comparison_table(runs)
    assert [row["differences"] for row in rows] == [{"trainer.lr": 0.1}, {"trainer.lr": 0.5}]
    assert [row["run"] for row in rows] == ["one", "two"]
    assert [row["label"] for row in rows] == ["digits one", "digits two"]
    finals = [cell.summary["final"]["central"]["accuracy"] for cell in reading.read(runs[0]).cells]
    found = rows[0]["metrics"]["central accuracy"]
    assert found == pytest.approx({"mean": np.mean(finals), "sd": np.std(finals, ddof=1), "count": 3})


def test_a_comparison_has_a_row_per_variant_with_its_own_scenario(tmp_path: Path) -> None:
    rows = report.comparison_table([make_run(tmp_path / "run")])
    assert [(row["variant"], row["differences"]) for row in rows] == [
        ("fedavg", {"strategy.name": "fedavg"}),
        ("fedprox", {"strategy.name": "fedprox"}),
    ]


def test_a_scenario_that_no_longer_reads_is_compared_as_it_stands(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, variants=(), seeds=(0,)) for name in ("one", "two")]
    (runs[1] / "scenario.yaml").write_text("name: digits\nolden: {knob: 3}\n")
    rows = report.comparison_table(runs)
    assert rows[1]["differences"]["olden.knob"] == 3
    assert rows[0]["differences"]["olden.knob"] is None


def test_the_same_run_twice_has_two_names(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", variants=(), seeds=(0,))
    labels = [row["label"] for row in report.comparison_table([run, run])]
    assert len(set(labels)) == 2


def test_a_comparisons_page_goes_where_the_caller_says(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, lr=lr) for name, lr in (("one", 0.1), ("two", 0.5))]
    target = report.compare(runs, tmp_path / "new" / "side-by-side.html")
    html = text_of(target)
    assert target == tmp_path / "new" / "side-by-side.html"
    assert "trainer.lr" in html
    assert "digits two / fedprox" in html
    assert pictures(html)
    assert "<script" not in html


def test_comparing_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to compare"):
        report.compare([], tmp_path / "out.html")
