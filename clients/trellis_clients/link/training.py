"""A node that trains: runs the client app on the tasks of the link, one after another, with everything kept warm."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from trellis_clients.link.agenda import EndedError, TaskCancelledError
from trellis_clients.link.connection import Connection, Identity
from trellis_clients.link.consent import Consent
from trellis_clients.link.lines import plain
from trellis_clients.link.store import Store
from trellis_clients.site import Cell


@dataclass(frozen=True)
class Live:
    """What is live of the cell of the latest task.

    Attributes:
        key: run, client and cell.
        sites: with the model.
        store: of the client in the cell.
    """

    key: str
    sites: client_app.Sites
    store: Store


class TrainingNode:
    """Answers the link's tasks with a client app.

    Args:
        identity: who it is.
        folder: of its store; payloads that outgrow memory lie there too.
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
        self.connection = Connection(identity, folder, counted)
        self.log = self.connection.log
        self.folder, self.changed = folder, changed or Consent()
        self.encoding, self.counted = encoding, counted
        self._live: Live | None = None

    def run(self) -> str:
        """Work until the run is over and return the server's last word, "" if the node was told to stop.

        Raises:
            GridError: the server does not want this node, or is lost for good.
        """
        try:
            self.connection.start()
            for task in self.connection.tasks():
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
        """Take no more tasks: ``run`` returns after the one under way. From any thread.

        An answer that is done and cannot be handed in is left on the disk after ``agenda.HAND_IN_S``.
        """
        self.connection.finish()

    # -- a task -----------------------------------------------------------------------------------------

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
            if self._live is not None:
                self.counted("store", {"value": str(self._live.store.num_bytes)})
            for field in ("task", "cell", "kind", "round"):
                self.log.about.pop(field, None)

    def _verdict(self, task: pb.Task) -> int:
        """Answer a task, if need be with a failure: whatever happens in a task must not end the node."""
        try:
            return self._submit(task)
        except EndedError:
            raise
        except TrellisError as error:
            reason = str(error)
        except OSError as error:  # an answer that could be lost with its state must not count
            reason = str(RunError("node-store", f"{self.folder} cannot be read or written: {error}"))
        except Exception as error:
            self.log.exception("task failed")
            reason = f"{type(error).__name__}: {error}"
        self.log.error("task failed", extra={"reason": plain(reason)})
        return self.connection.submit(task.id, None, (flower.FAILED_CLIENT, reason))

    def _submit(self, task: pb.Task) -> int:
        place = self.connection.agenda.place(task.id)
        live = self._cell(task, place)
        self._settle(live.store, task)
        answer = live.store.answer(task.id)
        if answer is None:
            received: wire.Content = {}
            for record in task.records:
                received |= {record.name: wire.unpack(self.connection.payload(record.payload, task.id))["record"]}
            self._note_round(received)
            reply, state = self._run(task, place, live, received)
            if reply.has_error():
                failed = reply.error.code, reply.error.reason or "no reason"
                return self.connection.submit(task.id, None, failed)
            answer = wire.pack(shorten(to_wire(reply.content), received, task.shortening))
            live.store.put(task.id, answer, wire.pack(to_wire(state)))
        else:
            self.log.info("task known")
        try:
            return self._hand_in(task.id, answer, live.store)
        except TaskCancelledError:
            self._note(live.store.dropped, task.id)
            raise

    def _hand_in(self, task: str, answer: bytes, store: Store) -> int:
        """Submit an answer, and note down what became of it."""
        verdict = self.connection.submit(task, answer, encoding=self.encoding)
        if verdict in (pb.VERDICT_ACCEPTED, pb.VERDICT_DUPLICATE):
            self._note(store.accepted, task)
        else:
            self._note(store.dropped, task)
        return verdict

    def _note(self, verdict: Callable[[str], None], task: str) -> None:
        """Have the store note what became of an answer."""
        try:
            verdict(task)
        except OSError as error:  # known in memory; noted with the next answer, or asked for after a restart
            self.log.warning("verdict not noted", extra={"task": task, "reason": str(error)})

    def _settle(self, store: Store, task: pb.Task) -> None:
        """Ask what became of answers whose verdict did not come, or a state that counts would be forgotten."""
        if task.after in store:  # this one counts: the server says so without being asked
            self._note(store.accepted, task.after)
        for known in store.unsettled():
            kept = store.answer(known)
            if known != task.id and kept is not None:
                self._hand_in(known, kept, store)

    def _run(
        self, task: pb.Task, place: pb.JoinResponse, live: Live, received: wire.Content
    ) -> tuple[Message, RecordDict]:
        run = flower.enter_run()
        message = Message(from_wire(received), flower.node_of(place.client), task.kind)
        flower.rename(message, task.id)
        kept = self._state(task, live.store)
        state = RecordDict() if kept is None else from_wire(wire.unpack(kept))
        context = client_context(place.client, place.num_clients, state, run.run_id)
        return run_client(client_app.make_app(sites=live.sites), message, context)

    def _state(self, task: pb.Task, store: Store) -> bytes | None:
        """Return the private state that a task starts from: after the answer that the server says, if it says so."""
        if not task.HasField("after"):
            return store.state()
        if not task.after:
            return None
        if task.after in store:
            return store.state_after(task.after)
        self.log.warning("no state after the last answer that counts", extra={"reason": plain(task.after)})
        return store.state()

    def _note_round(self, received: wire.Content) -> None:
        """Have log lines say which round the task is of."""
        config = received.get("config")
        if config is not None and isinstance(number := config.values.get("server-round"), int):
            self.log.about["round"] = number

    def _cell(self, task: pb.Task, place: pb.JoinResponse) -> Live:
        """Return the live objects of the task's cell, and the node's store for it."""
        key = f"{place.run}/{place.client}/{task.setup.digest}"
        if self._live is None or self._live.key != key:
            self._live = None  # the model before goes first
            setup = _read(self.connection.payload(task.setup, task.id))
            each = self.changed(scenario.validated(Scenario, setup["scenario"]))
            store = Store(self.folder, place.run, setup["cell"], place.client, place.keep_answers)
            sites = client_app.Sites({setup["cell"]: Cell(scenario.plain(each), setup["seed"])})
            _set_threads(each.runtime.threads)
            self._live = Live(key, sites, store)
        return self._live


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
