"""The benchmark of overhead runs and writes its files. Figures are for people to judge, on a quiet machine."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "overhead.py"


@pytest.mark.slow
def test_a_quick_measure_of_the_empty_round_writes_its_files(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--only", "empty-round", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "overhead.json").read_text())
    names = [row["name"] for row in written["rows"]]
    assert names == ["empty-round", "empty-round-unsaved"]
    assert all(row["cpu"] > 0 and row["unit"] == "ms" for row in written["rows"])
    assert written["quick"] is True and {"started", "python", "torch", "cpu"} <= written["environment"].keys()
    with (tmp_path / "overhead.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == names
    assert all(name in done.stdout for name in names)
