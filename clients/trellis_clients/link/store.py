"""What a node keeps on its disk: its private state, and its latest answers in case the server loses them.

    <folder>/instance                       says that it is this node that is back
    <folder>/<run>/<cell>/index.json        which answers there are, and which of them the state is of
    <folder>/<run>/<cell>/<task>.answer     the records sent
    <folder>/<run>/<cell>/<task>.state      the private state after that task

An answer is written down before it is sent, its state counts once the server has accepted it, and ``index.json`` is
replaced in one step: killed at any moment, a node knows on its return what it has done and what counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from trellis.errors import RunError


def instance_of(folder: Path) -> str:
    """Return the name of this node's store, made up at its first start."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "instance"
    if not path.exists():
        write(path, secrets.token_hex(16).encode())
    return path.read_text().strip()


class Store:
    """Answers and private state of one cell.

    Args:
        folder: the node's.
        run, cell: which one; anything but letters, digits, ``.``, ``_`` and ``-`` is replaced.
        keep: how many answers.

    Raises:
        RunError: the index is damaged.
    """

    def __init__(self, folder: Path, run: str, cell: str, keep: int) -> None:
        self.folder = folder / _safe(run) / _safe(cell)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.keep = max(keep, 1)
        self._index: dict[str, Any] = {"state": None, "answers": []}
        path = self.folder / "index.json"
        if path.exists():
            try:
                self._index = json.loads(path.read_text())
                assert isinstance(self._index["answers"], list)
            except (ValueError, KeyError, AssertionError):
                raise RunError(
                    "node-store", f"{path} is damaged; remove {self.folder} to start this node anew"
                ) from None

    def state(self) -> bytes | None:
        """Return the private state that counts, None before there is any."""
        task = self._index["state"]
        return (self.folder / f"{task}.state").read_bytes() if task else None

    def state_after(self, task: str) -> bytes:
        """Return the private state that counts if a known answer is accepted."""
        return (self.folder / f"{task}.state").read_bytes()

    def counts(self, task: str) -> bool:
        """Return whether an answer was accepted before."""
        return task in self._index.get("counted", [])

    def answer(self, task: str) -> bytes | None:
        """Return an answer that was given before, whether or not the server had it."""
        return (self.folder / f"{task}.answer").read_bytes() if task in self._index["answers"] else None

    def unsettled(self) -> list[str]:
        """Return the tasks whose answers the server may have, or not: this node was killed before it could note it."""
        return [task for task in self._index["answers"] if not self.counts(task)]

    def put(self, task: str, answer: bytes, state: bytes) -> None:
        """Write an answer down, with the state that will count if it is accepted.

        Raises:
            OSError: it cannot be written, for example on a full disk; the store is what it was.
        """
        try:
            write(self.folder / f"{task}.state", state)
            write(self.folder / f"{task}.answer", answer)
            self._index["answers"].append(task)
            self._save()
        except OSError:
            if task in self._index["answers"]:
                self._index["answers"].remove(task)
            self._remove(task)
            raise

    def accepted(self, task: str) -> None:
        """Make the state after this task the one that counts. Of a task accepted before, it changes nothing."""
        if task not in self._index["answers"] or task in self._index.get("counted", []):
            return
        self._index["state"] = task
        self._index.setdefault("counted", []).append(task)
        old = self._prune()
        self._save()
        for each in old:  # after the index, which must not name what is gone
            self._remove(each)

    def dropped(self, task: str) -> None:
        """Forget an answer that came too late. One that counted before stays."""
        if task in self._index["answers"] and task not in self._index.get("counted", []):
            self._index["answers"].remove(task)
            self._save()
            self._remove(task)

    def _prune(self) -> list[str]:
        answers, old = self._index["answers"], []
        while len(answers) > self.keep:
            oldest = next(task for task in answers if task != self._index["state"])
            answers.remove(oldest)
            old.append(oldest)
        self._index["counted"] = [task for task in self._index["counted"] if task in answers]
        return old

    def _remove(self, task: str) -> None:
        for suffix in ("answer", "state"):
            (self.folder / f"{task}.{suffix}").unlink(missing_ok=True)

    def _save(self) -> None:
        write(self.folder / "index.json", json.dumps(self._index).encode())


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and have it on the disk before going on."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _safe(name: str) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "-", name)[:100]
    return cleaned if cleaned.strip(".") else "-"
