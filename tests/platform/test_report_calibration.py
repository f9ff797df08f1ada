"""The page's section on a calibrated classifier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from report_runs import make_run, write_lines
from trellis import report
from trellis.report import calibration, figures, page, reading


def calibrated(folder: Path, **changes: object) -> Path:
    """Return a run of two seeds whose cells end with a calibration."""
    make_run(folder, variants=("ccvr",), seeds=(0, 1), rounds=2, classes=3)
    for seed, (before, after) in enumerate([(0.5, 0.75), (0.6, 0.75)]):
        path = folder / f"cells/ccvr-seed{seed}/metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        step = {
            "accuracy-before": before,
            "accuracy-after": after,
            "tested-classes": [0, 2],
            "class-accuracy-before": [0.2, 0.8],
            "class-accuracy-after": [0.7 + 0.1 * seed, 0.8],
            "weight-norms-before": [0.5, 1.0, 2.0],
            "weight-norms-after": [2.0, 2.5, 3.0],
            "clients-used": [0, 1, 2],
            "clients-refused": [4],
            "bytes-up": 3000,
            "bytes-down": 1000,
            **changes,
        }
        write_lines(path, [*lines, {**lines[-1], "round": 3, "train": None, "finish": step}])
    return folder


def test_both_heads_side_by_side(tmp_path: Path) -> None:
    folder = calibrated(tmp_path / "run")
    section = calibration.section(figures.series_of(reading.read(folder)))
    assert section is not None
    (row,) = section["rows"]
    assert (row["gain"], row["norms"], row["used"], row["refused"]) == (
        "+20.00 ± 7.07",
        ["0.500 to 2", "2 to 3"],
        "3",
        2,
    )
    assert row["before"].startswith("55.00 ± 7.07")
    assert row["bytes"].startswith("4")
    assert section["classes"] == ["0", "2"]
    assert [[v[:4] for v in each["values"]] for each in section["by_class"]] == [["20.0", "80.0"], ["75.0", "80.0"]]
    page = report.build(folder).read_text()
    assert "<h2>Calibration</h2>" in page
    assert "+20.00 ± 7.07" in page


def test_runs_without_it_have_no_such_section(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", seeds=(0,))
    assert calibration.section(figures.series_of(reading.read(folder))) is None
    assert "<h2>Calibration</h2>" not in report.build(folder).read_text()


def test_damaged_figures_are_left_out(tmp_path: Path) -> None:
    broken = {"class-accuracy-after": "?", "weight-norms-after": [None], "clients-used": {}, "bytes-up": "many"}
    section = calibration.section(figures.series_of(reading.read(calibrated(tmp_path / "run", **broken))))
    assert section is not None
    assert section["rows"][0]["norms"][1] == "–"
    assert section["by_class"][1]["values"] == ["–", "–"]
    none = calibrated(tmp_path / "none", **{"accuracy-after": None})
    assert calibration.section(figures.series_of(reading.read(none))) is None


@pytest.mark.parametrize(
    ("done", "planned", "shown"), [(3, 3.0, "3"), (2, 3.0, "2 of 3"), (4, 3.0, "3 and a last step"), (2, None, "2")]
)
def test_a_step_after_the_last_round_is_no_round_too_many(done, planned, shown):
    assert page._rounds(str(done), done, planned) == shown
