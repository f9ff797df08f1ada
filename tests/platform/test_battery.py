"""docs/reliability.md says what the tests say, and every case of the batteries has a test."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "battery.py"


def test_the_page_is_that_of_the_tests_and_every_case_has_one():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_case_without_a_test_and_a_mark_without_a_case_are_said(tmp_path):
    battery = runpy.run_path(str(SCRIPT))
    found = battery["collect"]()
    assert not battery["problems"](found)
    assert battery["problems"]({**found, "F99": []}) == ["F99 is no case of the batteries"]
    del found["F2"]
    assert battery["problems"](found) == ["no test is marked F2: kill clients"]


def test_a_table_that_is_out_of_date_is_noticed(tmp_path):
    for part in ("tests/battery.py", "docs/reliability.md", "benchmarks/results/battery.json"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / part).exists():
            shutil.copy(ROOT / part, tmp_path / part)
    marks = {case: f"test_{case.lower()}" for case in runpy.run_path(str(SCRIPT))["CASES"]}
    tests = "".join(f'@pytest.mark.battery("{case}")\ndef {name}(): ...\n' for case, name in marks.items())
    (tmp_path / "tests" / "test_all.py").write_text(tests)
    script = [sys.executable, tmp_path / "tests" / "battery.py"]
    assert subprocess.run([*script, "--check"], capture_output=True, check=False).returncode == 1
    subprocess.run([*script, "--write"], check=True)
    assert subprocess.run([*script, "--check"], capture_output=True, check=False).returncode == 0
    assert "| | [`f2`](../tests/test_all.py) | fast | F2. | – |" in (tmp_path / "docs" / "reliability.md").read_text()


def test_a_part_that_is_in_no_name_and_a_protection_that_is_not_there_are_said():
    said = ((SCRIPT, "--run"), (ROOT / "tools" / "mutations.py",))
    for command in said:
        done = subprocess.run([sys.executable, *command, "no such part"], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "no such part" in done.stderr
