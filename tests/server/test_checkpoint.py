"""Checkpoints: whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from trellis import records
from trellis.errors import RunError
from trellis_server import checkpoint
from trellis_server.checkpoint import Snapshot


def snapshot(number: int, changed=()) -> Snapshot:
    clients = {c: RecordDict({"s": ConfigRecord({"round": number if c in changed else -1})}) for c in (1, 2)}
    return Snapshot(
        round=number,
        arrays=records.array_record({"w": np.full(3, number, np.float32)}),
        strategy=records.array_record({"m": np.full(2, number)}),
        values={"x": [1, {"y": 0.1}]},
        clients=clients,
        changed=set(changed),
    )


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path, snapshot(1, changed=(1, 2)))
    checkpoint.save(tmp_path, snapshot(2, changed=(2,)))
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded.round == 2
    assert loaded.arrays["w"].numpy().tolist() == [2, 2, 2]
    assert loaded.values == {"x": [1, {"y": 0.1}]}
    assert loaded.clients[1].config_records["s"]["round"] == 1
    assert loaded.clients[2].config_records["s"]["round"] == 2


def test_nothing_there_is_none(tmp_path):
    assert checkpoint.load(tmp_path) is None


def test_old_states_go_and_unchanged_clients_are_not_rewritten(tmp_path):
    checkpoint.save(tmp_path, snapshot(1, changed=(1, 2)), keep=2)
    before = (tmp_path / "clients/000001-000001.safetensors").stat().st_mtime_ns
    for number in (2, 3, 4):
        checkpoint.save(tmp_path, snapshot(number, changed=(2,)), keep=2)
    assert sorted(p.name for p in tmp_path.glob("round-*")) == ["round-000003.safetensors", "round-000004.safetensors"]
    assert sorted(p.name for p in (tmp_path / "clients").glob("*")) == [
        "000001-000001.safetensors",
        "000002-000003.safetensors",
        "000002-000004.safetensors",
    ]
    assert (tmp_path / "clients/000001-000001.safetensors").stat().st_mtime_ns == before


@pytest.mark.battery("F5")
@pytest.mark.parametrize("damage", [b"", b"garbage", None, "one byte"])
def test_a_damaged_state_gives_the_one_before_it(tmp_path, damage):
    checkpoint.save(tmp_path, snapshot(1, changed=(1, 2)))
    checkpoint.save(tmp_path, snapshot(2, changed=(1, 2)))
    file = tmp_path / "round-000002.safetensors"
    if damage is None:
        file.unlink()
    elif damage == "one byte":  # which still reads well
        file.write_bytes(file.read_bytes().replace(np.full(3, 2, np.float32).tobytes(), bytes(12)))
    else:
        file.write_bytes(damage)
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded.round == 1


def test_all_damaged_is_an_error(tmp_path):
    checkpoint.save(tmp_path, snapshot(1))
    (tmp_path / "round-000001.safetensors").write_bytes(b"x")
    with pytest.raises(RunError, match="no state"):
        checkpoint.load(tmp_path)


def test_a_manifest_cannot_point_outside(tmp_path):
    folder = tmp_path / "c"
    checkpoint.save(folder, snapshot(1))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["states"][0]["state"]["file"] = "../elsewhere"
    (tmp_path / "elsewhere").write_bytes(b"")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="leaves"):
        checkpoint.load(folder)


@pytest.mark.battery("F5", "F1")
@pytest.mark.parametrize("step", range(7))
def test_a_crash_at_any_write_leaves_the_previous_state(tmp_path, monkeypatch, step):
    """Fail at the k-th file operation of the second save, as a full disk or a kill would."""
    checkpoint.save(tmp_path, snapshot(1, changed=(1, 2)))
    calls = iter(range(100))
    real = checkpoint.os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) == step:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, snapshot(2, changed=(1, 2)))
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded.round == 1
    assert loaded.arrays["w"].numpy().tolist() == [1, 1, 1]
