"""`flwr run` for real: Flower's command line, its own local SuperLink, its simulation on Ray, our app."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

import federations
from flower_runtime import APP, Flower
from trellis import experiment, scenario
from trellis.runs import Run, read_lines, read_status

SETTINGS = ("clients=4", "rounds.count=2", "rounds.clients_per_round=3", "model.hidden=[8]")


@pytest.fixture
def flwr(tmp_path: Path) -> Iterator[Flower]:
    flower = Flower(tmp_path / "home")
    yield flower
    flower.stop()
    for process in flower.processes():
        process.kill()


@contextmanager
def watched(flower: Flower) -> Iterator[dict[psutil.Process, str]]:
    """Note every process that lives for a while, by the name of its program."""
    seen: dict[psutil.Process, str] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            for process in flower.processes():
                with suppress(psutil.Error):
                    programs = [Path(part).name for part in process.cmdline()[:2]]
                    seen[process] = next((name for name in programs if not name.startswith("python")), "python")

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_flwr_run_runs_a_scenario_to_the_bits_of_trellis_run(tmp_path, flwr):
    runs = tmp_path / "runs"
    with watched(flwr) as seen:
        done = flwr.run(APP, 4, f"runs='{runs}' seed=1 set='{'; '.join(SETTINGS)}'")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = runs.glob("flower-app/*")
    cell = folder / "cells" / "main-seed1"
    assert read_status(folder) == {"state": "complete", "error": None, "finished": read_status(folder)["finished"]}
    assert (folder / "report.html").stat().st_size > 10_000
    lines = read_lines(cell / "metrics.jsonl")
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert [(line["cohort"], line["replies"], line["failures"]) for line in lines[1:]] == [(3, 3, [])] * 2
    assert all(math.isfinite(line["central"]["loss"]) for line in lines)
    assert all(math.isfinite(line["train"]["loss"]) for line in lines[1:])
    assert lines[-1]["central"]["loss"] < lines[0]["central"]["loss"]

    loaded = scenario.load(APP / "scenario.yaml", (*SETTINGS, "seeds=1", "runtime.grid=local"))
    own = experiment.execute(Run.create(tmp_path / "own", loaded))
    summary = json.loads((cell / "summary.json").read_text())
    assert summary["sha256"] == own.summaries[0]["sha256"]
    assert summary["bytes_up"] == own.summaries[0]["bytes_up"]

    assert {"flower-superlink", "flwr-simulation", "raylet"} <= set(seen.values()), "the watch looks the wrong way"
    assert flwr.stop() == []
    _, alive = psutil.wait_procs(seen, timeout=30)
    assert alive == []
    assert flwr.processes() == []


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_superlink_and_two_supernodes_come_to_the_bits_of_trellis_run(tmp_path, flwr):
    """As on real machines: Flower starts a process for every message a node gets, which imports torch anew."""
    runs = tmp_path / "runs"
    settings = (
        "clients=2",
        "rounds.count=2",
        "rounds.clients_per_round=2",
        "model.hidden=[8]",
        "rounds.deadline_s=600",
    )
    flwr.deploy(nodes=2)
    done = flwr.run_deployed(APP, f"runs='{runs}' set='{'; '.join(settings)}'", timeout=1200)
    logs = "".join(path.read_text()[-3000:] for path in flwr.home.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    (folder,) = runs.glob("flower-app/*")
    assert read_status(folder)["state"] == "complete", (read_status(folder), logs)
    lines = read_lines(folder / "cells" / "main-seed0" / "metrics.jsonl")
    assert [(line["round"], line["replies"], line["failures"]) for line in lines[1:]] == [(1, 2, []), (2, 2, [])]

    loaded = scenario.load(APP / "scenario.yaml", (*settings, "seeds=[0]", "runtime.grid=local"))
    own = experiment.execute(Run.create(tmp_path / "own", loaded))
    summary = json.loads((folder / "cells" / "main-seed0" / "summary.json").read_text())
    assert summary["sha256"] == own.summaries[0]["sha256"]
    programs = {Path(part).name for each in flwr.processes() for part in each.cmdline()[:2]}
    assert {"flower-superlink", "flower-supernode"} <= programs, "the nodes were others"
    assert flwr.stop() == []


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_flwr_run_with_another_number_of_nodes_says_so(tmp_path, flwr):
    federations.write(tmp_path)
    done = flwr.run(APP, 2, f"runs='{tmp_path / 'runs'}' scenario='{tmp_path / 'digits.yaml'}'")
    assert done.returncode == 0, (
        "flwr now says how a run ended: docs/flower.md sends readers to the run's folder for it"
    )
    (folder,) = (tmp_path / "runs").glob("digits/*")
    status = read_status(folder)
    assert status["state"] == "failed"
    reason = "counts 2 partitions, and the scenario has 6 clients"
    assert reason in status["error"]
    assert reason in done.stdout
