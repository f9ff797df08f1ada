"""A node that trains: runs the client app on the tasks of the link, one after another, with everything kept warm."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict

from trellis import flower, scenario
from trellis.errors import DataError, RunError, TrellisError
from trellis.grids.grpc import from_wire, to_wire
from trellis.grids.local import client_context, run_client
from trellis.scenario import Scenario
from trellis.wire import content as wire
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.shortening import shorten
from trellis_clients import app as client_app
from trellis_clients.link.connection import Connection, EndedError, Identity
from trellis_clients.link.consent import Consent
from trellis_clients.link.store import Store
from trellis_clients.site import Cell

log = logging.getLogger("trellis.node")


class TrainingNode:
    """Answers the link's tasks with a client app.

    Args:
        identity: who it is.
        folder: of its store.
        changed: makes the scenario over for this node before anything of it is loaded: names its own data, and finds
            the operator's copies of plug-in files. By default no file with code is allowed.
        encoding: of answers.
        counted: called with the name of an event and its labels, for metrics.
    """

    def __init__(
        self,
        identity: Identity,
        folder: Path,
        *,
        changed: Callable[[Scenario], Scenario] | None = None,
        encoding: pb.Encoding = pb.ENCODING_NONE,
        counted: Callable[[str, Mapping[str, str]], None] = lambda *_: None,
    ) -> None:
        self.connection = Connection(identity)
        self.folder, self.changed = folder, changed or Consent()
        self.encoding, self.counted = encoding, counted
        self._finishing = False
        self._live: tuple[str, client_app.Sites, Store] | None = None

    def run(self) -> str:
        """Work until the run is over and return the server's last word.

        Raises:
            GridError: the server does not want this node, or is lost for good.
        """
        try:
            self.connection.start()
            for task in self.connection.tasks():
                if self._finishing:
                    break
                try:
                    self._answer(task)
                finally:
                    self.connection.done(task.id)
        except EndedError as end:
            return str(end)
        finally:
            self.connection.close("it stops")
        return ""

    def finish(self) -> None:
        """Take no more tasks: ``run`` returns after the one under way. From any thread."""
        self._finishing = True
        self.connection.wake()

    def _answer(self, task: pb.Task) -> None:
        started = time.perf_counter()
        try:
            verdict = self._submit(task)
        except EndedError:
            if self.connection.cancelled(task.id):
                log.info("task cancelled", extra={"task": task.id})
                return
            raise
        except TrellisError as error:
            verdict = self.connection.submit(task.id, None, (flower.FAILED_CLIENT, str(error)))
        said = pb.Verdict.Name(verdict).removeprefix("VERDICT_").lower()
        self.counted("task", {"kind": task.kind, "verdict": said})
        log.info("task done", extra={"task": task.id, "kind": task.kind, "verdict": said,
                                     "seconds": round(time.perf_counter() - started, 3)})  # fmt: skip

    def _submit(self, task: pb.Task) -> int:
        sites, store = self._cell(task)
        answer = store.answer(task.id)
        if answer is None:
            received: wire.Content = {}
            for record in task.records:
                received |= {record.name: wire.unpack(self.connection.payload(record.payload, task.id))["record"]}
            reply, state = self._run(task, sites, received, store)
            if reply.has_error():
                failed = reply.error.code, reply.error.reason or "no reason"
                return self.connection.submit(task.id, None, failed)
            answer = wire.pack(shorten(to_wire(reply.content), received, task.shortening))
            try:
                store.put(task.id, answer, wire.pack(to_wire(state)))
            except OSError as error:  # an answer that could be lost with its state must not count
                raise RunError("node-store", f"{store.folder} cannot be written to: {error.strerror}") from None
        else:
            log.info("task known", extra={"task": task.id})
        try:
            return self._hand_in(task.id, answer, store)
        except EndedError:
            if self.connection.cancelled(task.id):
                store.dropped(task.id)
            raise

    def _hand_in(self, task: str, answer: bytes, store: Store) -> int:
        """Submit an answer, and note down what became of it."""
        verdict = self.connection.submit(task, answer, encoding=self.encoding)
        try:
            if verdict in (pb.VERDICT_ACCEPTED, pb.VERDICT_DUPLICATE):
                store.accepted(task)
            else:
                store.dropped(task)
        except OSError as error:  # known in memory; noted with the next answer, or asked for after a restart
            log.warning("verdict not noted", extra={"task": task, "reason": str(error)})
        return verdict

    def _run(
        self, task: pb.Task, sites: client_app.Sites, received: wire.Content, store: Store
    ) -> tuple[Message, RecordDict]:
        joined = self.connection.joined
        assert joined is not None
        run = flower.enter_run()
        message = Message(from_wire(received), flower.node_of(joined.client), task.kind)
        flower.rename(message, task.id)
        kept = store.state()
        state = RecordDict() if kept is None else from_wire(wire.unpack(kept))
        context = client_context(joined.client, joined.num_clients, state, run.run_id)
        return run_client(client_app.make_app(sites=sites), message, context)

    def _cell(self, task: pb.Task) -> tuple[client_app.Sites, Store]:
        """Return the live objects of the task's cell, and the node's store for it."""
        joined = self.connection.joined
        assert joined is not None
        key = f"{joined.run}/{task.setup.digest}"
        if self._live is None or self._live[0] != key:
            self._live = None  # the model before goes first
            setup = _read(self.connection.payload(task.setup, task.id))
            each = self.changed(scenario.validated(Scenario, setup["scenario"]))
            store = Store(self.folder, joined.run, setup["cell"], joined.keep_answers)
            for known in store.unsettled():  # or a state that counts would be forgotten
                kept = store.answer(known)
                if known != task.id and kept is not None:
                    self._hand_in(known, kept, store)
            sites = client_app.Sites({setup["cell"]: Cell(scenario.plain(each), setup["seed"])})
            _set_threads(each.runtime.threads)
            self._live = key, sites, store
        return self._live[1], self._live[2]


def _read(buffer: Any) -> dict[str, Any]:
    try:
        setup = json.loads(bytes(buffer))
        assert isinstance(setup["cell"], str) and isinstance(setup["seed"], int)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise DataError("link-setup", "the server's description of the cell cannot be read") from None
    return dict(setup)


def _set_threads(count: int) -> None:
    """Take as many threads as the scenario says: sums over another number differ in the last bits."""
    import torch

    torch.set_num_threads(count)
