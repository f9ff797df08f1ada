"""Clients on Ray: persistent workers that hold one client app each and walk through the cohort.

What a round costs beside the clients' own work is one call to an actor per client, or per batch of clients that take
no more than a few milliseconds. Content that messages share goes to each worker once. A worker gets its next client
when it hands in a reply; nothing polls.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from flwr.app import ArrayRecord, Message, RecordDict

from trellis import flower, memory
from trellis.errors import GridError
from trellis.grids._ray_cohort import Batch, Cohort, Turn, largest
from trellis.grids._ray_contents import Contents
from trellis.grids._ray_crew import Crew, Seat, cause, deaths, last_line
from trellis.grids._ray_session import INLINE_BYTES, give_back_pages, start_ray, stop_ray
from trellis.grids._ray_worker import AppFactory, Outcome, envelope
from trellis.grids.base import ClientGrid
from trellis.records import LiveArray

__all__ = ["AppFactory", "RayGrid", "start_ray", "stop_ray"]

MAX_CRASHES = 3
"""A client that took its worker down this often is not run any more."""

PIPELINED_BELOW_S = 0.05
"""Where clients take less than this, each worker has its next client at hand while it works on one. Longer
clients wait with the grid instead, so that none stands behind a slow one while another worker is idle."""

BATCH_S = 0.01
"""Clients that take no longer than this together go to a worker in one call, which costs as much as one client's."""

STRANDED_AFTER_S = 1.0
"""A client at hand that waits this long for the one before it goes to an idle worker, if there is one."""

log = logging.getLogger(__name__)

AHEAD_BYTES = 64_000_000
"""Replies that may wait for an earlier client's, taken to be as large as their messages. Two a worker always may."""


class RayGrid(ClientGrid):
    """Run an unmodified Flower ``ClientApp`` in Ray actors, one per worker, on this machine or a cluster.

    Replies come as they are ready; ``Ordered`` around this grid puts them in order. At most
    ``max(4 * workers, 16)`` messages, fewer of large models, are under way or answered ahead of the oldest open
    one, which bounds what ``Ordered`` and the object store have to keep; behind a straggler the other workers go
    on that far and then wait for it.

    A client cannot hurt another: one that raises, hangs, exits, is killed, or replies with something that
    cannot be sent gets an error reply, its worker is replaced where need be, and the round goes on. A client
    that is under way at the deadline is stopped.

    Replies are rebuilt here from content or error, as answers to the messages that were sent. One stream at a
    time.

    Args:
        make_app: makes the client app in each worker: a callable that cloudpickle can send, or
            ``("package.module:function", arguments)``.
        num_clients: clients get node ids from ``flower.node_of(0)`` on and ``partition-id`` from 0 on.
        workers: number of workers; if None, as many as the cluster's CPUs (and GPU shares) allow with
            ``threads`` each, at most one per client.
        threads: threads of torch in each worker. Changing it can change the last bits of results.
        gpus_per_worker: share of a GPU that each worker takes.
        address: a running Ray cluster, ``"auto"`` or ``"host:port"``; None uses Ray as it runs in this
            process, or starts one for it. See ``start_ray``.
        memory_per_worker_mb: a worker whose own memory is above this after a client is replaced.
        start_timeout: seconds that a worker may take to make its app.

    Attributes:
        crashes: how often each client took its worker down.

    Raises:
        GridError: Ray does not start, or the cluster is smaller than ``workers``.
    """

    def __init__(
        self,
        make_app: AppFactory,
        num_clients: int,
        *,
        workers: int | None = None,
        threads: int = 1,
        gpus_per_worker: float = 0,
        address: str | None = None,
        memory_per_worker_mb: int | None = None,
        start_timeout: float = 300.0,
    ) -> None:
        super().__init__(num_clients)
        self.crashes: Counter[int] = Counter()
        self._pace = float("inf")  # seconds that clients take, of late
        self._large = False  # whether what is being sent is large
        self._streaming = threading.Lock()
        self._pushed: queue.SimpleQueue[list[Message] | None] = queue.SimpleQueue()
        self._pusher: threading.Thread | None = None
        self._finished_lock = threading.Lock()
        self._contents = Contents()
        self._owns_ray = start_ray(address)
        try:
            self._crew = Crew(
                make_app,
                num_clients,
                workers=workers,
                threads=threads,
                gpus_per_worker=gpus_per_worker,
                memory_mb=memory_per_worker_mb,
                start_timeout=start_timeout,
            )
        except BaseException:
            if self._owns_ray:
                stop_ray()
            raise

    in_process = False

    @property
    def workers(self) -> int:
        """Number of workers."""
        return len(self._crew.seats)

    def start(self) -> None:
        """Wait until every worker has made its client app. ``stream`` does so by itself, before its clock starts.

        Raises:
            GridError: the app cannot be made, or a worker does not come up.
        """
        self._crew.check_open()
        self._crew.start()

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        self._crew.check_open()
        return self._stream(flower.number(messages), timeout)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages and return their ids at once. Their replies are there for ``pull_messages`` as they come."""
        self._crew.check_open()
        numbered = flower.number(messages)
        if self._pusher is None:
            self._pusher = threading.Thread(target=self._answer_pushed, name="trellis-ray-grid", daemon=True)
            self._pusher.start()
        self._pushed.put(numbered)
        return [message.metadata.message_id for message in numbered]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._finished_lock:
            return super().pull_messages(message_ids)

    def close(self) -> None:
        """Stop the workers, and Ray if this grid started it."""
        self._contents.close()
        self._crew.close()
        if self._pusher is not None:
            self._pushed.put(None)
            self._pusher.join()
            self._pusher = None
        if self._owns_ray:
            self._owns_ray = False
            stop_ray()

    def _stream(self, messages: list[Message], timeout: float | None, *, patient: bool = False) -> Iterator[Message]:
        if not self._streaming.acquire(blocking=patient):
            raise GridError("grid-busy", "replies to earlier messages are still due; take them all before sending more")
        try:
            self.start()
            end = None if timeout is None else time.monotonic() + timeout
            cohort = Cohort(messages, window=_window(messages, self.workers))
            self._large = cohort.largest >= memory.LARGE
            while cohort.open:
                self._crew.check_open()
                if end is None or time.monotonic() < end:
                    yield from self._dispatch(cohort)
                stranded = self._stranded()
                rescue = min((seat.busy_since + STRANDED_AFTER_S for seat in stranded), default=None)
                arrived = self._crew.wait(self._crew.seats, _earlier(end, rescue))
                for seat in arrived:
                    if seat.building:
                        self._crew.built(seat)
                    else:
                        yield from self._take(seat, cohort)
                if arrived or not cohort.open:
                    continue
                if rescue is not None and (end is None or rescue < end):
                    self._rescue(stranded, cohort)
                else:
                    self._stop_clients()
                    yield from _cut(cohort, f"no reply before the deadline of {timeout:g} s")
        finally:
            self._stop_clients()  # also where the caller wants no more replies
            self._forget()
            self._streaming.release()

    def _dispatch(self, cohort: Cohort) -> Iterator[Message]:
        """Give every worker that has room the next clients, the idle ones first."""
        if self._large:
            memory.trim()  # what the reply before has freed
        quarantined: list[Turn] = []
        slow = time.monotonic() - PIPELINED_BELOW_S
        most = self._batch_size(cohort)
        for depth in range(2 if self._pace < PIPELINED_BELOW_S else 1):
            for seat in self._crew.seats:
                if seat.building or (seat.batches and seat.busy_since < slow):
                    continue
                while len(seat.batches) <= depth:
                    batch = cohort.batch(most if seat.near else 1, beside=seat.current)
                    if batch is None:
                        break
                    barred = [turn for turn in batch.counting if self.crashes[turn.client] >= MAX_CRASHES]
                    for turn in barred:
                        cohort.close(turn)
                    quarantined.extend(barred)
                    if allowed := [turn for turn in batch.counting if turn not in barred]:
                        self._send(seat, Batch(allowed), cohort)
        for turn in quarantined:
            yield flower.failure(turn.message, flower.FAILED_WORKER, f"quarantined after {MAX_CRASHES} crashes")

    def _batch_size(self, cohort: Cohort) -> int:
        """Return how many clients go in one call: no more than a worker's share, and few unless short and small."""
        share = -(-len(cohort.waiting) // self.workers)
        inline = INLINE_BYTES // max(cohort.largest, 1)
        return max(1, min(share, inline, int(BATCH_S / max(self._pace, 1e-6))))

    def _send(self, seat: Seat, batch: Batch, cohort: Cohort) -> None:
        turns = batch.counting
        parcel = cohort.parcel(turns[0], self._contents)
        orders = [
            (ticket, envelope(turn.message), self.states.get(turn.client))
            for ticket, turn in zip(batch.tickets, turns, strict=True)
        ]
        content = () if seat.holds == parcel.key else parcel.arguments
        answer = seat.actor.run.remote(orders, parcel.key, *content)
        seat.holds = parcel.key
        if not seat.batches:
            seat.busy_since = time.monotonic()
        seat.batches.append((answer, batch))

    def _stranded(self) -> list[Seat]:
        """Return seats where a client waits for the one before it, while another worker has nothing to do."""
        seats = self._crew.seats
        if all(seat.batches or seat.building for seat in seats):
            return []
        return [seat for seat in seats if sum(len(batch.counting) for _, batch in seat.batches) > 1]

    def _rescue(self, stranded: list[Seat], cohort: Cohort) -> None:
        """Take back clients that wait for one that takes long. Should one be run twice, one reply counts.

        Those that were done before it are among them: their replies come with the slow one's only.
        """
        seat = min(stranded, key=lambda seat: seat.busy_since)
        at = self._crew.board.read(seat.number) if seat.near else None
        (_, current), *following = seat.batches
        taken = current.take_back(but=at)
        for _, batch in following:
            taken += batch.counting
            batch.turns = [None] * len(batch.turns)
        cohort.give_back(taken)

    def _take(self, seat: Seat, cohort: Cohort) -> Iterator[Message]:
        """Yield the replies that have come from a worker, or an error reply for the client it failed at."""
        import ray

        answer, batch = seat.batches.popleft()
        seat.busy_since = time.monotonic()
        try:
            outcomes: list[Outcome | None] = ray.get(answer)
        except deaths() as error:
            yield from self._bury(seat, batch, cohort, error)
            return
        except Exception as error:  # a reply could not be pickled there, or not be read here
            seat.holds = 0
            if len(batch.turns) > 1:
                cohort.give_back(replace(turn, alone=True) for turn in batch.counting)
                return
            for turn in batch.counting:
                cohort.close(turn)
                reason = f"its reply could not be sent: {last_line(error)}"
                yield flower.failure(turn.message, flower.FAILED_CLIENT, reason)
            return
        del answer  # or the object store would keep large replies until all have been merged
        missing = [turn for turn, outcome in zip(batch.turns, outcomes, strict=True) if turn and not outcome]
        cohort.give_back(missing)
        if any(outcome and outcome[-1] for outcome in outcomes):
            log.info("a worker is replaced: it holds more than %s MB", self._crew.memory_mb)
            cohort.give_back(self._crew.replace(seat))
        outcomes.reverse()
        for each in batch.turns:
            if (outcome := outcomes.pop()) is not None and each is not None:
                yield self._reply(each, outcome, cohort)
            del outcome  # a large model's place in the object store, before its worker goes on

    def _reply(self, turn: Turn, outcome: Outcome, cohort: Cohort) -> Message:
        content, failed, state, seconds, _ = outcome
        cohort.close(turn)
        self._pace = seconds if self._pace == float("inf") else 0.9 * self._pace + 0.1 * seconds
        self.keep_state(turn.client, RecordDict() if state is None else _owned(state))
        if content is not None:
            give_back_pages(content)
            return flower.reply(content, turn.message)
        assert failed is not None
        return flower.failure(turn.message, *failed)

    def _bury(self, seat: Seat, batch: Batch, cohort: Cohort, error: Exception) -> Iterator[Message]:
        """Replace a worker that died, and yield an error reply for the client it died at, where that is certain.

        It is where one client was under way. Of several, the first may have been done, and its reply lost with the
        worker when the next brought that down; so all are run again, each alone.
        """
        others = bool(seat.batches) or len(batch.turns) > 1
        behind = self._crew.replace(seat)
        if others or not batch.counting:
            cohort.give_back(replace(turn, alone=True) for turn in (*batch.counting, *behind))
            return
        (turn,) = batch.counting
        cohort.close(turn)
        self.crashes[turn.client] += 1
        log.info("client %d: its worker died: %s", turn.client, error)
        yield flower.failure(turn.message, flower.FAILED_WORKER, f"its worker died: {cause(error)}")

    def _stop_clients(self) -> None:
        """Stop whatever is under way. Only a worker's end can stop a client, so its worker is replaced."""
        for seat in self._crew.seats:
            if seat.batches and not self._crew.closed:
                self._crew.replace(seat)

    def _forget(self) -> None:
        """Have workers let go of a large model, so that its place in the object store is free for the next."""
        if not self._large or self._crew.closed:
            return
        self._large = False
        for seat in self._crew.seats:
            if seat.holds:
                seat.actor.forget.remote()
                seat.holds = 0

    def _answer_pushed(self) -> None:
        """Answer pushed messages batch by batch, in a thread of its own."""
        while (batch := self._pushed.get()) is not None:
            unanswered = {message.metadata.message_id: message for message in batch}
            try:
                for reply in self._stream(batch, max((m.metadata.ttl for m in batch), default=None), patient=True):
                    unanswered.pop(reply.metadata.reply_to_message_id)
                    self._finish(reply)
            except GridError as error:
                for message in unanswered.values():
                    self._finish(flower.failure(message, flower.FAILED_WORKER, str(error)))

    def _finish(self, reply: Message) -> None:
        with self._finished_lock:
            self._finished[reply.metadata.reply_to_message_id] = reply


def _earlier(*moments: float | None) -> float | None:
    return min((moment for moment in moments if moment is not None), default=None)


def _cut(cohort: Cohort, reason: str) -> Iterator[Message]:
    for turn in list(cohort.open.values()):
        cohort.close(turn)
        yield flower.failure(turn.message, flower.FAILED_DEADLINE, reason)


def _owned(state: RecordDict) -> RecordDict:
    """Return a state with arrays of its own: those of an answer keep their place in the object store taken."""
    result = RecordDict()
    for name, record in state.items():
        if isinstance(record, ArrayRecord):
            copy = ArrayRecord()
            for key, array in record.items():
                copy[key] = LiveArray(array.numpy()) if isinstance(array, LiveArray) else array
            record = copy
        result[name] = record
    return result


def _window(messages: list[Message], workers: int) -> int:
    """Return how many messages may be under way or answered ahead of the oldest open one."""
    return max(2 * workers, min(max(4 * workers, 16), AHEAD_BYTES // max(largest(messages), 1)))
