"""A node that trains: runs the client app on the tasks of the link, one after another, with everything kept warm."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict

from trellis import flower, scenario
from trellis.errors import DataError
from trellis.grids.grpc import from_wire, to_wire
from trellis.grids.local import client_context, run_client
from trellis.scenario import Scenario
from trellis.wire import content as wire
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.shortening import shorten
from trellis_clients import app as client_app
from trellis_clients.link.agenda import EndedError, TaskCancelledError
from trellis_clients.link.connection import Identity
from trellis_clients.link.consent import Consent
from trellis_clients.link.lines import plain
from trellis_clients.link.store import Store
from trellis_clients.link.transfers import Counted
from trellis_clients.link.working import Worker
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


class TrainingNode(Worker):
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
        counted: Counted = lambda *_: None,
    ) -> None:
        super().__init__(identity, folder, encoding, counted)
        self.changed = changed or Consent()
        self._live: Live | None = None

    def run(self) -> str:
        """Work until the run is over and return the server's last word, "" if the node was told to stop.

        Raises:
            GridError: the server does not want this node, or is lost for good.
        """
        try:
            self.work()
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

    def store(self) -> Store | None:
        return None if self._live is None else self._live.store

    # -- a task -----------------------------------------------------------------------------------------

    def submit(self, task: pb.Task) -> int:
        place = self.connection.agenda.place(task.id)
        live = self._cell(task, place)
        self._settle(live.store, task)
        answer = live.store.answer(task.id)
        if answer is None:
            received: wire.Content = {}
            for record in task.records:
                received |= {record.name: wire.unpack(self.connection.payload(record.payload, task.id))["record"]}
            if (config := received.get("config")) is not None:
                self.note_round(config.values.get("server-round"))
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
            self.note(live.store.dropped, task.id)
            raise

    def _hand_in(self, task: str, answer: bytes, store: Store) -> int:
        """Submit an answer, and note down what became of it."""
        verdict = self.connection.submit(task, answer, encoding=self.encoding)
        if verdict in (pb.VERDICT_ACCEPTED, pb.VERDICT_DUPLICATE):
            self.note(store.accepted, task)
        else:
            self.note(store.dropped, task)
        return verdict

    def _settle(self, store: Store, task: pb.Task) -> None:
        """Ask what became of answers whose verdict did not come, or a state that counts would be forgotten."""
        if task.after in store:  # this one counts: the server says so without being asked
            self.note(store.accepted, task.after)
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
