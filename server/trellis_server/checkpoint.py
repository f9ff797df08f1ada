"""The state of a run after a round, on disk: enough to go on to the same bits.

Layout of a ``checkpoint`` folder::

    round-000012.safetensors          global arrays, strategy state, loop state
    clients/000007-000012.safetensors private state of client 7 as of round 12
    manifest.json                     which of these are the latest whole state, with their SHA-256

Every file is written under a temporary name, flushed to the disk, and renamed; the manifest comes last. A
crash at any instant leaves the previous manifest and all files it names. Only clients whose state changed
are written again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from trellis import records
from trellis.errors import RunError

MANIFEST = "manifest.json"
FORMAT = "trellis-checkpoint-1"


@dataclass
class Snapshot:
    """What a run is after a round.

    Attributes:
        round: the last completed round.
        arrays: the global model.
        strategy: the strategy's tensors, by name.
        values: JSON-able rest: the strategy's numbers, the gate's counters, the loop's totals.
        clients: private state by client number, of clients that keep any.
        changed: clients whose state differs from the previous snapshot's.
    """

    round: int
    arrays: ArrayRecord
    strategy: ArrayRecord
    values: dict[str, Any]
    clients: Mapping[int, RecordDict] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)


def save(folder: Path, snapshot: Snapshot, keep: int = 2) -> None:
    """Write a snapshot and drop states older than the ``keep`` latest."""
    (folder / "clients").mkdir(parents=True, exist_ok=True)
    history = _read_manifest(folder)
    latest = history[-1] if history else {"clients": {}}
    content = RecordDict({"values": ConfigRecord({"json": json.dumps(snapshot.values)})})
    content["arrays"], content["strategy"] = snapshot.arrays, snapshot.strategy
    entry: dict[str, Any] = {"round": snapshot.round}
    entry["state"] = _write(folder, f"round-{snapshot.round:06d}.safetensors", records.to_bytes(content))
    clients = {name: file for name, file in latest["clients"].items() if int(name) in snapshot.clients}
    for client in sorted(snapshot.changed & snapshot.clients.keys()):
        name = f"clients/{client:06d}-{snapshot.round:06d}.safetensors"
        clients[str(client)] = _write(folder, name, records.to_bytes(snapshot.clients[client]))
    entry["clients"] = clients
    history = [*[old for old in history if old["round"] < snapshot.round], entry][-keep:]
    manifest = {"format": FORMAT, "states": history}
    _write(folder, MANIFEST, json.dumps(manifest, indent=1).encode())
    _drop_unnamed(folder, history)


def load(folder: Path) -> Snapshot | None:
    """Return the latest whole state, or None where there is none yet.

    A state whose files are damaged is passed over for the one before it.

    Raises:
        RunError: there are states, but none is whole.
    """
    history = _read_manifest(folder)
    problem = ""
    for entry in reversed(history):
        try:
            content = records.from_bytes(_read(folder, entry["state"]))
            clients = {int(name): records.from_bytes(_read(folder, f)) for name, f in entry["clients"].items()}
        except (OSError, RunError) as error:
            problem = str(error)
            continue
        return Snapshot(
            round=entry["round"],
            arrays=records.array_records(content)["arrays"],
            strategy=records.array_records(content)["strategy"],
            values=json.loads(str(records.config_record(content, "values")["json"])),
            clients=clients,
        )
    if history:
        raise RunError("checkpoint-damaged", f"no state in {folder} is whole: {problem}")
    return None


def _read_manifest(folder: Path) -> list[dict[str, Any]]:
    path = folder / MANIFEST
    if not path.is_file():
        return []
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise RunError("checkpoint-format", f"{path} has format {manifest['format']!r}; expected {FORMAT!r}")
        states: list[dict[str, Any]] = manifest["states"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError("checkpoint-damaged", f"{path} is not a manifest: {error}") from None
    return states


def _write(folder: Path, name: str, blob: bytes) -> dict[str, str]:
    """Write a file so that under its final name it is always whole."""
    target, temporary = folder / name, folder / f"{name}.tmp"
    with temporary.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"file": name, "sha256": hashlib.sha256(blob).hexdigest()}


def _read(folder: Path, entry: Mapping[str, str]) -> bytes:
    path = (folder / entry["file"]).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise RunError("checkpoint-damaged", f"{entry['file']!r} leaves the checkpoint's folder")
    blob = path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != entry["sha256"]:
        raise RunError("checkpoint-damaged", f"{path} does not have the digest its manifest says")
    return blob


def _drop_unnamed(folder: Path, history: list[dict[str, Any]]) -> None:
    named = {MANIFEST}
    for entry in history:
        named.add(entry["state"]["file"])
        named.update(file["file"] for file in entry["clients"].values())
    for path in [*folder.glob("*"), *folder.glob("clients/*")]:
        if path.is_file() and path.relative_to(folder).as_posix() not in named:
            path.unlink()
