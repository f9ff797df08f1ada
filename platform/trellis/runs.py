"""A run's folder: everything that happened, readable while it happens and after a crash.

::

    runs/<scenario>/<time>/
        scenario.yaml       resolved and complete
        environment.json    versions and machine
        status.json         running, complete or failed, with the reason
        seats.json          of a deployed run: which node is which client
        cells/<variant>-seed<k>/
            metrics.jsonl   one line a round
            clients.jsonl   one line a client's reply
            partition.json  examples per client and class
            summary.json    written when the cell is complete
            checkpoint/     the state to resume from
            events.out.*    TensorBoard
        report.html
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform as stdlib_platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from trellis import scenario as scenario_file
from trellis.errors import RunError, listed, nearest
from trellis.scenario import Scenario

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LATEST = "latest"
SEATS = "seats.json"
VERSIONS = ("trellis", "flwr", "ray", "torch", "numpy", "flwr-datasets", "scikit-learn", "pydantic")


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that the file is whole under its name at every instant."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1, sort_keys=False) + "\n")
    temporary.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a ``.jsonl`` file; a last line that a crash cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    result = []
    for number, line in enumerate(lines, 1):
        try:
            result.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise RunError("run-damaged", f"{path} line {number} is not JSON") from None
    return result


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge a run's figures: versions and machine, no names of people or hosts."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": stdlib_platform.python_version(),
        "platform": stdlib_platform.platform(),
        "cpus": os.cpu_count(),
        **versions,
    }


@dataclass(frozen=True)
class CellFolder:
    """One variant under one seed."""

    path: Path
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def complete(self) -> bool:
        return (self.path / "summary.json").is_file()

    def append(self, file: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines to a ``.jsonl`` file and flush them to the disk."""
        if lines:
            with (self.path / file).open("a") as out:
                out.write("".join(json.dumps(line) + "\n" for line in lines))
                out.flush()
                os.fsync(out.fileno())

    def keep_until(self, number: int) -> None:
        """Drop what was written for rounds after ``number``: a resumed run will write it again."""
        for file in ("metrics.jsonl", "clients.jsonl"):
            path = self.path / file
            if path.is_file():
                lines = [line for line in read_lines(path) if line["round"] <= number]
                temporary = path.with_name(file + ".tmp")
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
                temporary.replace(path)

    def tensorboard(self, purge_step: int | None = None) -> SummaryWriter:
        """Open a TensorBoard writer; events after ``purge_step`` of an earlier attempt are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.path), purge_step=purge_step)


class Run:
    """A run's folder, held by one process at a time while it is written to."""

    def __init__(self, path: Path, scenario: Scenario) -> None:
        self.path = path
        self.scenario = scenario
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, root: Path, scenario: Scenario) -> Self:
        """Make a new folder ``root/<scenario>/<time>``, with a counter where two start in one second."""
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        parent = root / scenario.name
        parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f".{i}" for i in range(1, 1000))):
            path = parent / (stamp + suffix)
            try:
                path.mkdir()
            except FileExistsError:
                continue
            break
        (path / "scenario.yaml").write_text(scenario_file.dump(scenario))
        write_json(path / "environment.json", environment())
        run = cls(path, scenario)
        run.status("running")
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing folder.

        Raises:
            RunError: there is no run in the folder.
            ScenarioError: its scenario is no longer readable by this version.
        """
        if not (path / "scenario.yaml").is_file():
            raise RunError("run-missing", f"no run in {path}: it holds no scenario.yaml")
        return cls(path, scenario_file.read(path / "scenario.yaml"))

    def __enter__(self) -> Self:
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise RunError("run-busy", f"{self.path} is being written to by another process") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    @property
    def deployed(self) -> bool:
        """Whether its clients were nodes: then the run's folder says which node is which client."""
        return (self.path / SEATS).is_file()

    def cells(self) -> Iterator[tuple[Scenario, CellFolder]]:
        """Yield every variant and seed with its complete scenario and folder, seeds innermost."""
        for variant, each in scenario_file.expand(self.scenario):
            for seed in self.scenario.seeds:
                path = self.path / "cells" / f"{variant or 'main'}-seed{seed}"
                path.mkdir(parents=True, exist_ok=True)
                yield each, CellFolder(path, variant or "main", seed)

    def status(self, state: str, error: str | None = None) -> None:
        """Say where the run stands: ``running``, ``complete`` or ``failed`` with its reason."""
        finished = None if state == "running" else datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.path / "status.json", {"state": state, "error": error, "finished": finished})


def read_status(path: Path) -> dict[str, Any]:
    """Return a run's status; a run whose process died says ``interrupted``."""
    try:
        status: dict[str, Any] = json.loads((path / "status.json").read_text())
    except (OSError, ValueError):
        return {"state": "unknown", "error": None, "finished": None}
    if status.get("state") == "running" and not _held(path):
        status["state"] = "interrupted"
    return status


def _held(path: Path) -> bool:
    try:
        with (path / ".lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def find(root: Path) -> list[Path]:
    """Return the folders of all runs under ``root``, oldest first."""
    found = [path.parent for path in root.glob("*/*/scenario.yaml")]
    return sorted(found, key=lambda path: (path.name, path.parent.name))


def resolve(text: str, root: Path) -> Path:
    """Return the folder of the run that a person means: a path, ``latest``, ``name/time``, or ``name``.

    Raises:
        RunError: nothing fits; the nearest known run is named.
    """
    if (Path(text) / "scenario.yaml").is_file():
        return Path(text)
    runs = find(root)
    if text == LATEST and runs:
        return max(runs, key=lambda path: path.stat().st_mtime)
    named = [path for path in runs if text in (path.parent.name, path.name, f"{path.parent.name}/{path.name}")]
    if named:
        return named[-1]
    known = [f"{path.parent.name}/{path.name}" for path in runs]
    raise RunError(
        "run-missing",
        f"no run {text!r} under {root}.{nearest(text, known)} Known: {listed(known[-5:]) or 'none yet'}",
    )
