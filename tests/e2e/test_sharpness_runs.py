"""SAF and MESA in whole runs: what a client keeps over rounds, rounds that it sits out, a restart and other workers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from federations import DIGITS, lines, run, sha, write
from trellis import experiment, flower, scenario
from trellis.runs import Run
from trellis_clients import client_state
from trellis_server import checkpoint

SGD = "{name: sgd, lr: 0.1, batch_size: 32}"
SAM = "{name: sam, lr: 0.1, batch_size: 32}"
ESAM = "{name: esam, lr: 0.1, batch_size: 32}"
SAF = "{name: saf, lr: 0.1, batch_size: 32, local_epochs: 2, lookback: 3, start_epoch: 2, weight: 5.0}"
MESA = "{name: mesa-saf, lr: 0.1, batch_size: 32, decay: 0.9, start_epoch: 1, weight: 5.0, average: keep}"


def federation(trainer: str) -> str:
    """Return six clients of whom three train in each of five rounds."""
    assert SGD in DIGITS
    return DIGITS.replace(SGD, trainer).replace("count: 4, clients_per_round: 4", "count: 5, clients_per_round: 3")


class Stop(Exception):
    """Ends a run in the middle."""


def interrupted(folder: Path, text: str, number: int) -> Run:
    """Run a scenario until a round is done, and no further."""

    def stop(_, line):
        if line["round"] == number:
            raise Stop

    flower.quiet()
    current = Run.create(folder / "interrupted", scenario.load(write(folder, text)))
    with pytest.raises(Stop):
        experiment.execute(current, experiment.Hooks(on_round=stop))
    return Run.open(current.path)


def states(current: Run) -> dict[int, dict[str, Any]]:
    """Return what each client keeps as of the last checkpoint."""
    snapshot = checkpoint.load(current.path / "cells/main-seed0/checkpoint")
    assert snapshot is not None
    return {client: client_state.unpack(kept) for client, kept in snapshot.clients.items()}


def turns(current: Run) -> Counter[int]:
    """Return how often each client has trained."""
    return Counter(row["client"] for row in lines(current, "clients.jsonl") if row["phase"] == "train")


def test_safs_memory_counts_a_clients_own_epochs_and_survives_a_restart(tmp_path):
    text = federation(SAF)
    through, outcome = run(tmp_path, text=text)
    current = interrupted(tmp_path, text, 3)

    early = states(current)
    assert {client: state["memory"]["epoch"] for client, state in early.items()} == {
        client: 2 * count for client, count in turns(current).items()
    }
    resumed = experiment.execute(current)
    assert resumed.summaries[0]["sha256"] == outcome.summaries[0]["sha256"]

    late, counts = states(current), turns(current)
    assert counts == turns(through)
    assert len(set(counts.values())) > 1, "somebody sat out more rounds than others"
    for client, count in counts.items():
        memory = late[client]["memory"]
        assert memory["epoch"] == 2 * count
        newest = {2 * count - back for back in range(3)} & set(range(1, 2 * count + 1))
        assert set(memory["epochs"].flatten().tolist()) >= newest, "every one of the last three epochs is there"
        assert memory["outputs"].shape == (3, memory["epochs"].shape[1], 10)
    untouched = early.keys() - {row["client"] for row in lines(current, "clients.jsonl") if row["round"] > 3}
    for client in untouched:
        assert early[client]["memory"]["epochs"].equal(late[client]["memory"]["epochs"])


def test_the_memory_matters_only_if_it_is_kept(tmp_path, monkeypatch):
    """With a past of three epochs and two a round, a client that forgets between rounds is plain SGD."""
    kept = sha(tmp_path, text=federation(SAF))
    plain = sha(tmp_path, text=federation(SAF.replace("weight: 5.0", "weight: 0.0")))
    assert kept != plain
    monkeypatch.setattr(client_state, "unpack", lambda *_: {})
    assert sha(tmp_path, text=federation(SAF)) == plain


def test_what_is_sent_is_the_weights_and_nothing_else(tmp_path):
    """A client's replies are as long as with plain SGD, to the byte, whatever it has in its state by then."""
    traffic = {}
    for name, trainer in (("sgd", SGD), ("saf", SAF), ("mesa-saf", MESA)):
        (tmp_path / name).mkdir()
        current, _ = run(tmp_path / name, text=federation(trainer))
        rows = [row for row in lines(current, "clients.jsonl") if row["phase"] == "train"]
        traffic[name] = [(row["round"], row["client"], row["bytes_up"]) for row in rows]
    assert traffic["sgd"] == traffic["saf"] == traffic["mesa-saf"]


def test_mesas_average_survives_a_restart(tmp_path):
    text = federation(MESA)
    expected = sha(tmp_path, text=text)
    current = interrupted(tmp_path, text, 2)
    assert all(state["epochs"] == turns(current)[client] for client, state in states(current).items())
    assert experiment.execute(current).summaries[0]["sha256"] == expected


@pytest.mark.parametrize("trainer", [SAM, ESAM, SAF, MESA], ids=["sam", "esam", "saf", "mesa-saf"])
def test_a_probed_run_has_the_same_bits(tmp_path, trainer):
    """Bare replays, which know no state, run through the same losses and leave nothing behind."""
    text = federation(trainer)
    assert sha(tmp_path, ("probe.every=1",), text) == sha(tmp_path, ("probe.every=0",), text)


def test_ray_workers_give_the_same_bits(tmp_path, ray_session):
    text = federation(SAF)
    assert sha(tmp_path, ("runtime.grid=ray", "runtime.workers=2"), text) == sha(tmp_path, text=text)
