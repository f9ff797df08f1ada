"""Kill a run with SIGKILL wherever it happens to be; what goes on ends in the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from federations import DIGITS, sha, write
from trellis import experiment, scenario
from trellis.errors import TrellisError
from trellis.runs import Run, find, read_lines, read_status

SCAFFOLD = (DIGITS.replace("name: sgd", "name: scaffold") + "strategy: scaffold\n").replace("count: 4", "count: 12")
COMMAND = [sys.executable, "-c", "from trellis.cli import main; main()", "run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(path: Path, folder: Path) -> subprocess.Popen[str]:
    command = [*COMMAND, str(path), "--runs", str(folder), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def kill_after(process: subprocess.Popen[str], number: int) -> None:
    """Kill as soon as the line of a round is out: somewhere in the round after it."""
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("round") == number:
            process.send_signal(signal.SIGKILL)
            break
    process.wait(timeout=60)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    expected = sha(tmp_path, text=SCAFFOLD)
    path, folder = write(tmp_path, SCAFFOLD), tmp_path / "killed"
    kill_after(start(path, folder), 4)
    (run,) = find(folder)
    assert read_status(run)["state"] == "interrupted"
    before = [line["round"] for line in read_lines(run / "cells/main-seed0/metrics.jsonl")]
    assert before[:5] == [0, 1, 2, 3, 4]
    assert len(before) < 13

    # A second kill, while the resumed run is at work.
    command = [*COMMAND, "--resume", str(run), "--json"]
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    kill_after(second, before[-1] + 2)

    outcome = experiment.execute(Run.open(run))
    assert outcome.summaries[0]["sha256"] == expected
    assert [line["round"] for line in read_lines(run / "cells/main-seed0/metrics.jsonl")] == list(range(13))
    assert read_status(run)["state"] == "complete"


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_that_was_cut_off_is_written_again(tmp_path, cut):
    expected = sha(tmp_path)
    loaded = Run.create(tmp_path / "cut", scenario.load(write(tmp_path)))

    class Stop(Exception):
        pass

    def stop(_, line):
        if line["round"] == 2:
            raise Stop

    with pytest.raises(Stop):
        experiment.execute(loaded, experiment.Hooks(on_round=stop))
    metrics = loaded.path / "cells/main-seed0/metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-cut])
    outcome = experiment.execute(Run.open(loaded.path))
    assert outcome.summaries[0]["sha256"] == expected
    assert [line["round"] for line in read_lines(metrics)] == [0, 1, 2, 3, 4]


def test_a_complete_run_has_nothing_left_to_do(tmp_path):
    sha(tmp_path)
    (run,) = find(tmp_path / "runs")
    seen = []
    outcome = experiment.execute(Run.open(run), experiment.Hooks(on_round=lambda _, line: seen.append(line)))
    assert not seen
    assert len(outcome.summaries) == 1


def test_two_processes_cannot_write_one_run(tmp_path):
    sha(tmp_path)
    (run,) = find(tmp_path / "runs")
    with Run.open(run), pytest.raises(TrellisError, match="another process"):
        experiment.execute(Run.open(run))
