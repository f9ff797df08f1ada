"""What a node keeps on its disk: its private state, and its latest answers in case the server loses them.

    <folder>/instance                                says that it is this node that is back
    <folder>/lock                                    held by the process whose folder it is
    <folder>/<run>/<cell>-client-<n>/index.json      which answers there are, and which of them the state is of
    <folder>/<run>/<cell>-client-<n>/<task>.answer   the records sent
    <folder>/<run>/<cell>-client-<n>/<task>.state    the private state after that task

An answer is written down before it is sent, its state counts once the server has accepted it, and ``index.json`` is
replaced in one step: killed at any moment, a node knows on its return what it has done and what counted. A node that
comes back as another client keeps another store: private state belongs to a client and not to a machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trellis.errors import RunError

RUNS = 4
"""What is kept of the latest runs; of older ones it is removed."""

TASK = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
"""Ids come from the server and become names of files."""


def instance_of(folder: Path) -> str:
    """Return the name of this node's store, made up at its first start.

    Raises:
        RunError: the folder cannot be used.
    """
    path = folder / "instance"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write(path, secrets.token_hex(16).encode())
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError("node-store", f"{path}: {getattr(error, 'strerror', None) or error}") from None


def name_of(instance: str) -> str:
    """Return a name for a node that was given none: the machine's, and the same whenever it starts with this store."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:40].lstrip("._-")
    return f"{host or 'node'}-{instance[:8]}"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a node's folder: of two nodes in one, each would take the other's place at the server, without end.

    Raises:
        RunError: another process holds it, or it cannot be used.
    """
    path = folder / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise RunError("node-store", f"{path}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                "node-store-held", f"another process is the node of {folder}; give each node a --state of its own"
            ) from None
        yield
    finally:
        os.close(descriptor)


class Store:
    """Answers and private state of one client in one cell.

    Args:
        folder: the node's.
        run, cell: which one; anything but letters, digits, ``.``, ``_`` and ``-`` is replaced.
        client: of the federation.
        keep: how many answers.

    Raises:
        RunError: the index is damaged.
        OSError: the store cannot be read or written.
    """

    def __init__(self, folder: Path, run: str, cell: str, client: int, keep: int) -> None:
        self.folder = folder / _safe(run) / f"{_safe(cell)}-client-{client}"
        self.keep = max(keep, 1)
        self._index: dict[str, Any] = {"state": None, "answers": [], "counted": []}
        path = self.folder / "index.json"
        if path.exists():
            try:
                self._index |= _checked(json.loads(path.read_bytes()))
            except (ValueError, TypeError, AssertionError):
                raise RunError(
                    "node-store", f"{path} is damaged; remove {self.folder} to start this node anew"
                ) from None
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save()
            for each in (self.folder.parent, folder):  # or the folder's own name could be lost in a crash
                _sync(each)
        _drop_old_runs(folder, self.folder.parent)

    def state(self) -> bytes | None:
        """Return the private state that counts, None before there is any."""
        task = self._index["state"]
        return self._file(task, "state").read_bytes() if task else None

    def state_after(self, task: str) -> bytes:
        """Return the private state that counts if a known answer is accepted."""
        return self._file(task, "state").read_bytes()

    def __contains__(self, task: str) -> bool:
        """Whether the answer to a task, and the state after it, are here."""
        return task in self._index["answers"]

    def counts(self, task: str) -> bool:
        """Return whether an answer was accepted before."""
        return task in self._index["counted"]

    def answer(self, task: str) -> bytes | None:
        """Return an answer that was given before, whether or not the server had it."""
        return self._file(task, "answer").read_bytes() if task in self._index["answers"] else None

    def unsettled(self) -> list[str]:
        """Return the tasks whose answers the server may have, or not: this node could not note it."""
        return [task for task in self._index["answers"] if not self.counts(task)]

    def put(self, task: str, answer: bytes, state: bytes) -> None:
        """Write an answer down, with the state that will count if it is accepted.

        Raises:
            OSError: it cannot be written, for example on a full disk; the store is what it was.
        """
        try:
            write(self._file(task, "state"), state)
            write(self._file(task, "answer"), answer)
            self._index["answers"].append(task)
            self._save()
        except OSError:
            if task in self._index["answers"]:
                self._index["answers"].remove(task)
            self._remove(task)
            raise

    def accepted(self, task: str) -> None:
        """Make the state after this task the one that counts. Of a task accepted before, it changes nothing."""
        if task not in self._index["answers"] or task in self._index["counted"]:
            return
        self._index["state"] = task
        self._index["counted"].append(task)
        old = self._prune()
        self._save()
        for each in old:  # after the index, which must not name what is gone
            self._remove(each)

    def dropped(self, task: str) -> None:
        """Forget an answer that came too late. One that counted before stays."""
        if task in self._index["answers"] and task not in self._index["counted"]:
            self._index["answers"].remove(task)
            self._save()
            self._remove(task)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files in it."""
        sizes = 0
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):  # it may have been replaced meanwhile
                sizes += path.stat().st_size if path.is_file() else 0
        return sizes

    def _prune(self) -> list[str]:
        answers, old = self._index["answers"], []
        while len(answers) > self.keep:
            oldest = next(task for task in answers if task != self._index["state"])
            answers.remove(oldest)
            old.append(oldest)
        self._index["counted"] = [task for task in self._index["counted"] if task in answers]
        return old

    def _file(self, task: str, suffix: str) -> Path:
        if not re.fullmatch(TASK, task):
            raise RunError("node-store", f"{task!r:.80} is not a task's id, and names no file here")
        return self.folder / f"{task}.{suffix}"

    def _remove(self, task: str) -> None:
        for suffix in ("answer", "state"):
            self._file(task, suffix).unlink(missing_ok=True)

    def _save(self) -> None:
        write(self.folder / "index.json", json.dumps(self._index).encode())


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and have it on the disk under its name before going on."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    """Have a folder's list of names on the disk: a file that was renamed has its old name until then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checked(index: Any) -> dict[str, Any]:
    assert isinstance(index, dict)
    for key in ("answers", "counted"):
        assert all(isinstance(task, str) for task in index.get(key, []))
    assert isinstance(index.get("answers"), list) and isinstance(index.get("state"), str | None)
    return index


def _drop_old_runs(folder: Path, current: Path) -> None:
    """Remove the stores of runs but for the latest. What cannot be removed stays: it is in nobody's way."""
    last: dict[Path, int] = {}
    for path in folder.glob("*/*/index.json"):
        with contextlib.suppress(OSError):
            run = path.parents[1]
            last[run] = max(last.get(run, 0), path.stat().st_mtime_ns)
    last.pop(current, None)
    for run in sorted(last, key=lambda run: last[run], reverse=True)[RUNS - 1 :]:
        shutil.rmtree(run, ignore_errors=True)


def _safe(name: str) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "-", name)[:100]
    return cleaned if cleaned.strip(".") else "-"
