"""Disks that are full or only for reading, on either side: nothing is lost, and nothing is half written."""

from __future__ import annotations

import contextlib
import subprocess

import pytest

from deployment import SCENARIO, nodes, serve
from federations import lines
from trellis import experiment, flower, scenario
from trellis.errors import RunError
from trellis.runs import Run, read_status
from trellis_clients.link.store import write as write_whole

FOUR = range(4)


@contextlib.contextmanager
def small_disk(folder, megabytes=8):
    """A disk of its own; yields a function that fills it, and one that makes a folder read-only or mends that."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting is not permitted here")

    def fill():
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def protect(path, on):
        if on:
            subprocess.run(["mount", "--bind", path, path], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        else:
            subprocess.run(["umount", path], check=True)

    try:
        yield fill, protect
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.battery("F5")
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_no_checkpoint(tmp_path, simulated, fault):
    """The server's disk is full or read-only after round 1: a clear code, nothing half-written, and it resumes."""
    disk = tmp_path / "disk"
    with small_disk(disk) as (fill, protect):

        def after(_, line):
            if line["round"] == 1:
                fill() if fault == "full" else protect(folder, True)

        flower.quiet()
        (disk / "s.yaml").write_text(SCENARIO)
        run = Run.create(disk / "runs", scenario.load(disk / "s.yaml"))
        folder = run.path / "cells" / "main-seed0" / "checkpoint"
        with pytest.raises(RunError, match="resumed") as caught:
            experiment.execute(run, experiment.Hooks(on_round=after))
        assert caught.value.code == "run-disk"
        assert ("No space" if fault == "full" else "Read-only") in str(caught.value)
        (disk / "filler").unlink() if fault == "full" else protect(folder, False)
        outcome = experiment.execute(Run.open(run.path))
        assert outcome.summaries[0]["sha256"] == simulated
        assert [row["round"] for row in lines(run)] == [0, 1, 2, 3]
        assert read_status(run.path)["state"] == "complete"


@pytest.mark.battery("F5")
def test_a_node_whose_disk_is_full_fails_by_itself_until_there_is_room(tmp_path):
    """A node cannot keep its answer: its task fails with a code, nothing half-written stays, later rounds count it."""
    disk = tmp_path / "node-2"
    with small_disk(disk, 1) as (fill, _), nodes(tmp_path) as fleet:

        def after(_, line):
            if line["round"] == 1:
                fill()
            if line["round"] == 2:
                (disk / "filler").unlink()

        run, outcome = serve(
            tmp_path,
            lambda port: [fleet.start(port, client) for client in FOUR],
            overrides=("rounds.quorum=0.7", "evaluation.federated_every=0"),
            hooks=experiment.Hooks(on_round=after),
        )
        assert not outcome.failed
        rows = lines(run, "clients.jsonl")
        assert [row["replies"] for row in lines(run)[1:]] == [4, 3, 4]
        ((client, reason),) = {(row["client"], row["reason"]) for row in rows if not row["ok"]}
        assert client == 2
        assert "node-store" in reason
        assert "No space left" in reason
        kept = [path.name for path in disk.rglob("*") if path.is_file()]
        assert not [name for name in kept if name.startswith(".")]  # no half-written file
        assert sum(name.endswith(".answer") for name in kept) == 2


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "index.json"
    write_whole(path, b"before")

    def full(_):
        assert path.read_bytes() == b"before"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trellis_clients.link.store.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["index.json"]
