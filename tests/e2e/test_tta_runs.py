"""Forward-only adaptation in a federation: resumed runs and Ray workers give the bits of one unbroken process."""

from __future__ import annotations

import pytest

from federations import lines, run
from test_bits import resumed
from trellis.runs import find, read_lines

BASE = """\
name: forward-only
data: {name: digits, size: 16}
clients: 2
partition: {name: iid, test_fraction: 0.5}
model: MODEL
trainer: {name: TRAINER, stream: {severity: 3.0, segment: 4, batch_size: 16}}
strategy: {name: cema, batches: 2, epochs: 4}
rounds: {count: 4}
evaluation: {central_every: 0, federated_every: 0}
probe: {every: 0, least: 0}
runtime: {grid: local}
"""
CNN = "{name: small-cnn, width: 4, hidden: 32, norm: batch}"
SCENARIOS = {
    "moving": BASE.replace("MODEL", CNN).replace("TRAINER", "tta-bn, moving: true, weight: 0.1"),
    "t3a": BASE.replace("MODEL", CNN).replace("TRAINER", "tta-t3a, supports: 5"),
    "lame": BASE.replace("MODEL", CNN).replace("TRAINER", "tta-lame"),
    "foa": BASE.replace("MODEL", "{name: vit, patch: 4, dim: 16, depth: 2, heads: 2}").replace(
        "TRAINER", "tta-foa, prompts: 2"
    ),
}
TIMES = {"seconds", "cpu_seconds"}


def rows(folder):
    """Return what every client reported in every round; nothing the cloud holds depends on the adapters."""
    return [
        {key: value for key, value in row.items() if key not in TIMES} for row in read_lines(folder / "clients.jsonl")
    ]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_resumed_run_gives_the_same_answers(tmp_path, name):
    text = SCENARIOS[name]
    (tmp_path / "whole").mkdir()
    current, outcome = run(tmp_path / "whole", text=text)
    assert not outcome.failed, outcome.failed
    straight = rows(current.path / "cells/main-seed0")
    assert len(straight) == 8 and all(row["ok"] for row in straight)
    assert all(row["metrics"]["uploaded"] == 0 and row["bytes_up"] < 500 for row in straight)
    resumed(tmp_path, text)
    (broken,) = find(tmp_path / "runs")
    assert rows(broken / "cells/main-seed0") == straight
    accuracy = [line["train"]["accuracy"] for line in lines(current)[1:]]
    assert 0.1 < accuracy[-1] < 1 and len(set(accuracy)) > 1


def test_ray_workers_give_the_answers_of_one_process(tmp_path, ray_session):
    text = SCENARIOS["foa"].replace("count: 4", "count: 2")
    runs = [run(tmp_path, overrides, text)[0] for overrides in ((), ("runtime.grid=ray", "runtime.workers=2"))]
    local, ray = (sorted(rows(each.path / "cells/main-seed0"), key=str) for each in runs)
    assert [row["metrics"] for row in local] == [row["metrics"] for row in ray]
