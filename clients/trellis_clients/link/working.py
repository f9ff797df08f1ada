"""What every node does with its tasks: one after another, each answered, if need be with a failure."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from trellis.errors import DataError, RunError, TrellisError
from trellis.wire.generated import link_pb2 as pb
from trellis_clients.link.agenda import EndedError, TaskCancelledError
from trellis_clients.link.connection import Connection, Identity
from trellis_clients.link.lines import plain
from trellis_clients.link.store import Store
from trellis_clients.link.transfers import Counted

FAILED_CLIENT = 2
"""As in ``trellis.flower``, which imports Flower; a device does without it."""


class Worker(ABC):
    """Works off the tasks of the link. A kind of node says in ``submit`` what there is to do.

    Args:
        identity: who it is.
        folder: of its store; payloads that outgrow memory lie there too.
        encoding: of answers.
        counted: called with the name of an event and its labels, for metrics.
    """

    def __init__(self, identity: Identity, folder: Path, encoding: pb.Encoding, counted: Counted) -> None:
        self.connection = Connection(identity, folder, counted)
        self.log = self.connection.log
        self.folder, self.encoding, self.counted = folder, encoding, counted

    @abstractmethod
    def submit(self, task: pb.Task) -> int:
        """Do a task, hand its answer in and return the server's verdict. What it raises is handed in as a failure."""

    @abstractmethod
    def store(self) -> Store | None:
        """Return the store of the latest task's cell; None while there is none."""

    def fatal(self) -> tuple[type[TrellisError], ...]:
        """Return the errors after which the node cannot go on: it ends once the server was told."""
        return ()

    def work(self) -> None:
        """Work until the server has said goodbye, or somebody has told the node to stop.

        Raises:
            EndedError: the server said goodbye.
            GridError: it does not want this node, or is lost for good.
        """
        self.connection.start()
        for task in self.connection.tasks():
            try:
                self._answer(task)
            finally:
                self.connection.done(task.id)

    def _answer(self, task: pb.Task) -> None:
        started = time.perf_counter()
        self.log.about.update(task=task.id, cell=plain(task.cell), kind=plain(task.kind))
        try:
            said = pb.Verdict.Name(self._verdict(task)).removeprefix("VERDICT_").lower()
        except TaskCancelledError:
            self.log.info("task cancelled")
        except DataError as error:  # the server does not take a failure either; its deadline ends the task
            self.log.error("failure not reported", extra={"reason": str(error)})
        else:
            seconds = time.perf_counter() - started
            self.counted("task", {"kind": plain(task.kind), "verdict": said, "seconds": f"{seconds:.6f}"})
            self.log.info("task done", extra={"verdict": said, "seconds": round(seconds, 3)})
        finally:
            if (store := self.store()) is not None:
                self.counted("store", {"value": str(store.num_bytes)})
            for field in ("task", "cell", "kind", "round"):
                self.log.about.pop(field, None)

    def _verdict(self, task: pb.Task) -> int:
        """Answer a task, if need be with a failure: whatever happens in a task must not end the node."""
        try:
            return self.submit(task)
        except EndedError:
            raise
        except self.fatal() as error:
            self.connection.submit(task.id, None, (FAILED_CLIENT, str(error)))
            raise
        except TrellisError as error:
            reason = str(error)
        except OSError as error:  # an answer that could be lost with its state must not count
            reason = str(RunError("node-store", f"{self.folder} cannot be read or written: {error}"))
        except Exception as error:
            self.log.exception("task failed")
            reason = f"{type(error).__name__}: {error}"
        self.log.error("task failed", extra={"reason": plain(reason)})
        return self.connection.submit(task.id, None, (FAILED_CLIENT, reason))

    def note(self, verdict: Callable[[str], None], task: str) -> None:
        """Have the store note what became of an answer."""
        try:
            verdict(task)
        except OSError as error:  # known in memory; noted with the next answer, or asked for after a restart
            self.log.warning("verdict not noted", extra={"task": task, "reason": str(error)})

    def note_round(self, number: object) -> None:
        """Have log lines say which round the task is of."""
        if isinstance(number, int):
            self.log.about["round"] = number
