"""The workers of ``RayGrid``: hired, awaited, replaced when they die, dismissed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trellis.errors import GridError
from trellis.grids._ray_board import Board
from trellis.grids._ray_cohort import Batch, Turn
from trellis.grids._ray_worker import AppFactory, Worker

MAX_BUILDS = 3
"""Workers in a row that may die while they make their client app, before the run ends."""


@dataclass(eq=False)
class Seat:
    """A place for a worker, and what is under way there. Workers come and go, the seat stays.

    Attributes:
        number: from 0; its place on the board.
        building: pending answer of a worker that makes its app; None when it is ready.
        batches: pending answers and their turns, in the order in which the worker takes them.
        busy_since: when the worker came to the first of them, as far as is known here; monotonic clock.
        holds: key of the content that the worker has; 0 if none.
        near: whether the worker writes on the board, so that it may be sent several turns at once.
        builds: workers in a row that died before they were ready.
        hired: when the worker was asked for, in seconds of the monotonic clock.
    """

    number: int
    actor: Any = None
    building: Any = None
    batches: deque[tuple[Any, Batch]] = field(default_factory=deque)
    busy_since: float = 0.0
    holds: int = 0
    builds: int = 0
    hired: float = 0.0
    near: bool = False

    @property
    def current(self) -> Batch | None:
        """The turns that the worker is at, if any."""
        return self.batches[0][1] if self.batches else None

    @property
    def awaited(self) -> Any:
        """The answer that comes next from here, or None."""
        return self.building or (self.batches[0][0] if self.batches else None)


class Crew:
    """Persistent Ray actors, each with a client app of its own.

    Ray itself restarts nothing here: which client a worker died at, and what becomes of those behind it,
    is for the grid to say.
    """

    def __init__(
        self,
        make_app: AppFactory,
        num_clients: int,
        *,
        workers: int | None,
        threads: int,
        gpus_per_worker: float,
        memory_mb: int | None,
        start_timeout: float,
    ) -> None:
        import ray

        self.memory_mb = memory_mb
        self._start_timeout = start_timeout
        self.closed = False
        count = _count(workers, num_clients, threads, gpus_per_worker)
        try:
            self._make_app = ray.put(make_app)
        except Exception as error:
            raise GridError(
                "ray-worker-app",
                f"the client app's factory cannot be sent to a worker: {last_line(error.__cause__ or error)}",
            ) from error
        self._actor = ray.remote(Worker).options(
            num_cpus=1, num_gpus=gpus_per_worker, max_restarts=0, max_task_retries=0, max_concurrency=1
        )
        self._actor_args = (num_clients, threads, memory_mb)
        self.board = Board(count)
        self.seats = [Seat(number) for number in range(count)]
        for seat in self.seats:
            self._hire(seat)

    def start(self) -> None:
        """Wait until every worker is ready."""
        while waiting := [seat for seat in self.seats if seat.building]:
            for seat in self.wait(waiting):
                self.built(seat)

    def wait(self, seats: Iterable[Seat], end: float | None = None) -> list[Seat]:
        """Return a seat from which something has come, or nothing at the time ``end`` of the monotonic clock.

        Raises:
            GridError: a worker has taken too long to start.
        """
        import ray

        awaited = {seat.awaited: seat for seat in seats if seat.awaited is not None}
        if not awaited:
            return []
        late = min((seat.hired + self._start_timeout for seat in awaited.values() if seat.building), default=None)
        limit = min((moment for moment in (end, late) if moment is not None), default=None)
        ready, _ = ray.wait(list(awaited), timeout=None if limit is None else max(0.0, limit - time.monotonic()))
        if not ready and late is not None and late == limit:
            free = ray.available_resources().get("CPU", 0)
            raise GridError(
                "ray-worker-start",
                f"a Ray worker did not start within {self._start_timeout:g} s; {free:g} CPUs of the cluster are free",
            )
        return [awaited[ref] for ref in ready]

    def built(self, seat: Seat) -> None:
        """Take note that a worker is ready; replace it if it died instead.

        Raises:
            GridError: its app cannot be made, or its predecessors died in the same way.
        """
        import ray

        answer, seat.building = seat.building, None
        try:
            wrong, resident_mb, seat.near = ray.get(answer)
        except deaths() as error:
            seat.builds += 1
            if seat.builds >= MAX_BUILDS:
                raise GridError(
                    "ray-worker-start",
                    f"{MAX_BUILDS} workers in a row died while they made the client app: {cause(error)}",
                ) from error
            self.replace(seat)
            return
        except Exception as error:
            raise GridError(
                "ray-worker-app", f"the client app's factory cannot be used in a worker: {last_line(error)}"
            ) from error
        if wrong is not None:
            raise GridError("ray-worker-app", f"the client app cannot be made in a worker: {wrong}")
        if self.memory_mb is not None and resident_mb > self.memory_mb:
            raise GridError(
                "ray-worker-memory",
                f"runtime.memory_per_worker_mb is {self.memory_mb}, but a worker holds {resident_mb:.0f} MB "
                "before its first client",
            )
        seat.builds = 0

    def replace(self, seat: Seat) -> list[Turn]:
        """Put a new worker in a seat. Returns the turns that the old one had not handed in."""
        self.check_open()
        turns = [turn for _, batch in seat.batches for turn in batch.counting]
        seat.batches.clear()
        _dismiss(seat)
        self._hire(seat)
        return turns

    def close(self) -> None:
        """Dismiss every worker. Whoever waits for one gets a ``GridError``."""
        if not self.closed:
            self.board.close()
        self.closed = True
        for seat in self.seats:
            _dismiss(seat)

    def check_open(self) -> None:
        if self.closed:
            raise GridError("grid-closed", "the Ray grid was closed")

    def _hire(self, seat: Seat) -> None:
        seat.actor = self._actor.remote(*self._actor_args)
        seat.building = seat.actor.build.remote(self._make_app, self.board.at, seat.number)
        seat.holds = 0
        seat.hired = time.monotonic()


def _dismiss(seat: Seat) -> None:
    import ray

    if ray.is_initialized():
        ray.kill(seat.actor)


def _count(workers: int | None, num_clients: int, threads: int, gpus_per_worker: float) -> int:
    """Return how many workers there shall be, and see that the cluster can hold them."""
    import ray

    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 0)), float(resources.get("GPU", 0))
    by_gpu = int(gpus / gpus_per_worker + 1e-9) if gpus_per_worker else cpus
    if workers is None:
        workers = max(1, min(cpus // threads, by_gpu, num_clients))
    if workers > cpus:
        raise GridError(
            "ray-workers", f"runtime.workers is {workers}, but the Ray cluster has {cpus} CPUs: at most one each"
        )
    if workers > by_gpu:
        raise GridError(
            "ray-workers",
            f"runtime.gpus_per_worker is {gpus_per_worker:g} for {workers} workers, but the cluster has {gpus:g} GPUs",
        )
    return workers


def deaths() -> tuple[type[Exception], ...]:
    """What Ray raises where a worker, or the machine it ran on, is gone."""
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.WorkerCrashedError,
        exceptions.OutOfMemoryError,
        exceptions.NodeDiedError,
        exceptions.ObjectLostError,
    )


def cause(error: Exception) -> str:
    """Return in a few words why a worker died. Ray's own text lists every cause there could be."""
    text = str(error)
    if "low on memory" in text:
        return "Ray stopped it because the machine is low on memory"
    if "node has died" in text or "node failure" in text:
        return "its machine is gone"
    return "the process ended (a crash, an exit, or a kill for want of memory)"


def last_line(error: BaseException) -> str:
    """Return the last line of what Ray says of an exception in a worker: the exception itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
