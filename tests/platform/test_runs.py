"""Run folders: what is written, how it is found again, what a crash leaves."""

from __future__ import annotations

import json
import os

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from federations import lines, run
from trellis import cli, runs, scenario
from trellis.errors import TrellisError
from trellis.grids._grpc_seats import Seats


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    current, _ = run(folder, ("seeds=[0, 1]", "rounds.count=2"))
    return current


def test_a_finished_run_holds_everything(finished):
    assert scenario.read(finished.path / "scenario.yaml") == finished.scenario
    assert json.loads((finished.path / "environment.json").read_text())["flwr"]
    assert runs.read_status(finished.path)["state"] == "complete"
    for seed in (0, 1):
        cell = finished.path / "cells" / f"main-seed{seed}"
        assert {"metrics.jsonl", "clients.jsonl", "partition.json", "summary.json", "model.safetensors"} <= {
            path.name for path in cell.iterdir()
        }
        partition = json.loads((cell / "partition.json").read_text())
        assert sum(map(sum, partition["counts"])) == sum(partition["train"]) + sum(partition["test"])


def test_phases_account_for_the_round(finished):
    for line in lines(finished)[1:]:
        assert set(line["phases"]) >= {"sample", "train", "aggregate", "evaluate", "central", "checkpoint", "report"}
        assert sum(line["phases"].values()) == pytest.approx(line["seconds"])


def test_every_clients_results_are_kept(finished):
    rows = lines(finished, "clients.jsonl")
    for number in (1, 2):
        phases = [(row["phase"], row["ok"]) for row in rows if row["round"] == number]
        assert phases.count(("train", True)) == 4
        assert phases.count(("evaluate", True)) == 6
    assert all(row["norm"] > 0 for row in rows if row["phase"] == "train")
    assert all("accuracy" in row["metrics"] for row in rows if row["phase"] == "evaluate")


def test_tensorboard_events_say_what_the_metrics_say(finished):
    events = EventAccumulator(str(finished.path / "cells" / "main-seed0"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("central/accuracy")}
    assert shown == pytest.approx({line["round"]: line["central"]["accuracy"] for line in lines(finished)})


def test_runs_are_found_by_path_name_and_latest(finished):
    root = finished.path.parent.parent
    name = f"{finished.path.parent.name}/{finished.path.name}"
    for text in (str(finished.path), name, finished.path.name, finished.path.parent.name, "latest"):
        assert runs.resolve(text, root) == finished.path
    with pytest.raises(TrellisError, match="Did you mean"):
        runs.resolve(name + "x", root)


def test_two_runs_in_one_second_have_folders_of_their_own(tmp_path, finished):
    made = {runs.Run.create(tmp_path, finished.scenario).path for _ in range(3)}
    assert len(made) == 3


def test_a_run_whose_process_is_gone_is_interrupted(tmp_path, finished):
    current = runs.Run.create(tmp_path, finished.scenario)
    assert runs.read_status(current.path)["state"] == "interrupted"
    with current:
        assert runs.read_status(current.path)["state"] == "running"


def test_a_cut_line_is_left_out_and_a_broken_one_is_an_error(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"round": 1}\n{"rou')
    assert runs.read_lines(path) == [{"round": 1}]
    path.write_text('{"rou\n{"round": 2}\n')
    with pytest.raises(TrellisError, match="line 1"):
        runs.read_lines(path)


def test_no_name_of_a_person_or_host_is_recorded(finished, monkeypatch):
    text = (finished.path / "environment.json").read_text()
    assert os.uname().nodename not in text


def test_a_run_of_nodes_is_not_continued_in_simulation(tmp_path):
    """Private state is the nodes': without it the run would go on to other bits, and nobody would know."""
    current, _ = run(tmp_path, ("rounds.count=1",))
    seats = Seats(6, current.path / runs.SEATS)
    seats.give("a-node", 0)
    seats.save()
    with pytest.raises(TrellisError, match="trellis serve --resume") as caught:
        cli.run(None, None, str(current.path), tmp_path / "runs", quiet=True, json_=False)
    assert caught.value.code == "run-deployed"
