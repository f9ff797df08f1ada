"""The checks that need the other replies of a round: metric names, norm, direction.

The first replies of a round are held back until ``HOLD`` of them stand, and judged together: the median of
six norms and the direction of the five others are little moved by one offender among them. Later replies
are judged one by one against what was admitted. So at most ``HOLD`` replies and one model are held, on disk
where they are large.

Limits. One bad norm shows among three replies, or after three of earlier rounds; one sign flip among six,
and only where clients agree as much as it disagrees. Models of fewer than a hundred numbers have no usable
direction. Offenders in the majority define the cohort. A small or well-aimed poisoning (a backdoor) has an
ordinary norm and direction and cannot be seen here. An honest client whose data oppose almost everybody
else's, as a rare holder of one of two classes, looks like a sign flip: its reply is refused, though never
held against the client later; ``screening.min_cosine: null`` admits it. Where one client has a hundred times
the data of most and trains a hundred times the steps, its norm may call for a larger ``max_norm_ratio``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from trellis.grids._checks import Reply, short
from trellis.grids._updates import Direction
from trellis.scenario import Screening

HOLD = 6
LEAST_NORMS = 3
LEAST_OTHERS = 5
MEMORY = 200
"""Norms of earlier replies that the running median is taken over, beside this round's."""

Decision = tuple[Reply, str | None]
Schema = tuple[str, tuple[tuple[str, int | None], ...]]


class Cohort:
    """The replies of one round to messages of one type.

    Args:
        settings: the scenario's ``screening``.
        history: norms admitted in earlier rounds; this round's are added when it is finished.
        updates: whether the replies are updates of the model (train) or only metrics (evaluate).
        folder: where large replies wait; None for the system's temporary folder.
    """

    def __init__(
        self, settings: Screening, history: deque[float], *, updates: bool, folder: Path | None = None
    ) -> None:
        self.settings = settings
        self.updates = updates
        self.history = history
        self.norms = deque(history, MEMORY)
        self.limit: float | None = None
        self.schema: Schema | None = None
        self.cosines: deque[float] = deque(maxlen=MEMORY)
        self.direction = Direction(folder) if updates and settings.min_cosine is not None else None
        self.folder = folder
        self._held: list[Reply] = []
        self._open = False

    def take(self, reply: Reply) -> Iterator[Decision]:
        """Take the next reply; yield those that are decided by now, each with what is wrong with it or None."""
        if self._open:
            yield reply, self._judge(reply)
            return
        self._held.append(reply)
        if len(self._held) >= HOLD:
            yield from self._judge_held()
            if len(self._held) >= HOLD:
                yield from self._release()
        for held in self._held[-1:]:  # those before it went to wait when they came
            held.wait(self.folder)

    def finish(self) -> Iterator[Decision]:
        """Decide on all that is still held: no more replies come."""
        if not self._open:
            yield from self._judge_held()
            yield from self._release()
        self.history.clear()
        self.history.extend(self.norms)

    def _judge(self, reply: Reply) -> str | None:
        self._settle_limit([])
        along = self._compare(reply)
        for code, check in COHORT_CHECKS.items():
            if detail := check(self, reply):
                return f"{code}: {detail}"
        self._count(reply, along)
        self._remember(reply)
        if reply.cosine is not None:
            self.cosines.append(reply.cosine)
        return None

    def _judge_held(self) -> Iterator[Decision]:
        """Judge the held replies jointly. Those refused are yielded, the others stay held."""
        self._settle_schema()
        yield from self._refuse("metric-names")
        self._settle_limit([norm for reply in self._held if (norm := self._norm(reply)) > 0])
        yield from self._refuse("norm")
        for reply in self._held:
            self._count(reply, self._along(reply))
        # The worst first, then anew: a flipped update bends the direction that the others are compared with.
        while True:
            for reply in self._held:
                self._compare(reply)
            self.cosines = deque((reply.cosine for reply in self._held if reply.cosine is not None), MEMORY)
            offenders = self._offenders("direction")
            if not offenders:
                return
            yield self._drop(*min(offenders, key=lambda pair: pair[0].cosine or 0.0))

    def _release(self) -> Iterator[Decision]:
        self._open = True
        held, self._held = self._held, []
        for reply in held:
            self._remember(reply)
        for reply in held:
            yield reply, None

    def _offenders(self, code: str) -> list[tuple[Reply, str]]:
        check = COHORT_CHECKS.get(code)
        found = [(reply, check(self, reply)) for reply in self._held] if check else []
        return [(reply, f"{code}: {detail}") for reply, detail in found if detail]

    def _refuse(self, code: str) -> Iterator[Decision]:
        for reply, reason in self._offenders(code):
            yield self._drop(reply, reason)

    def _drop(self, reply: Reply, reason: str) -> Decision:
        self._held.remove(reply)
        if reply.counted and self.direction:
            self.direction.add(reply.values, reply.sent, reply.measured, self._along(reply), sign=-1)
        return reply, reason

    def _settle_schema(self) -> None:
        """Metric names are those of most of the held; among equals, of the one that came first."""
        schemas = Counter(map(schema_of, self._held))
        self.schema = max(schemas, key=lambda schema: schemas[schema], default=None)

    def _settle_limit(self, held: list[float]) -> None:
        if self.settings.max_norm_ratio is None or not self.updates:
            return
        ratio = self.settings.max_norm_ratio
        if self.norms and len(held) >= LEAST_NORMS and min(held) > ratio * median(self.norms):
            # All of them at once: the training changed (a warm restart, another stage), not the clients.
            self.norms.clear()
        known = [*self.norms, *held]
        self.limit = ratio * median(known) if len(known) >= LEAST_NORMS else None

    def _norm(self, reply: Reply) -> float:
        return reply.measured.norm if self.updates else 0.0

    def _remember(self, reply: Reply) -> None:
        if self._norm(reply) > 0:
            self.norms.append(reply.measured.norm)

    def _along(self, reply: Reply) -> float:
        if self.direction is None or not self._norm(reply) > 0:
            return 0.0
        return self.direction.along(reply.values, reply.sent, reply.measured)

    def _count(self, reply: Reply, along: float) -> None:
        if self.direction and not reply.counted and self._norm(reply) > 0:
            self.direction.add(reply.values, reply.sent, reply.measured, along)
            reply.counted = True

    def _compare(self, reply: Reply) -> float:
        """Note a reply's cosine with the others, and whether it may be held against it. Return what ``_along`` does."""
        along = self._along(reply)
        if self.direction and self._norm(reply) > 0:
            reply.cosine, others, enough = self.direction.cosine(along, member=reply.counted)
            reply.comparable = enough and others >= LEAST_OTHERS
        return along


def schema_of(reply: Reply) -> Schema:
    """Return the metric record's name, its keys, and the length of those values that are lists."""
    name, metrics = reply.metrics
    return name, tuple(sorted((k, len(v) if isinstance(v, list) else None) for k, v in metrics.items()))


def _metric_names(cohort: Cohort, reply: Reply) -> str | None:
    own = schema_of(reply)
    if cohort.schema is None or own == cohort.schema:
        return None
    (name, keys), (usual_name, usual_keys) = own, cohort.schema
    if name != usual_name:
        return f"the MetricRecord is named {short(name)}, the cohort's {short(usual_name)}"
    odd = sorted({short(key) for key, _ in set(keys) ^ set(usual_keys)})
    return f"{', '.join(odd[:3])}: missing, not the cohort's, or of another length"


def _norm(cohort: Cohort, reply: Reply) -> str | None:
    if cohort.limit is None or not cohort.updates:
        return None
    norm, ratio = reply.measured.norm, cohort.settings.max_norm_ratio
    return f"{norm:.4g} is more than {ratio:g} times the median" if norm > cohort.limit else None


def _direction(cohort: Cohort, reply: Reply) -> str | None:
    least = cohort.settings.min_cosine
    if least is None or reply.cosine is None or not reply.comparable or reply.cosine >= least:
        return None
    # An honest update turned round has minus the usual cosine. Where clients agree less than that among
    # themselves, as with one class each, a low cosine says nothing.
    if median(cohort.cosines) < -least:
        return None
    return f"the cosine with the cohort is {reply.cosine:.3f}, below {least:g}"


COHORT_CHECKS: dict[str, Callable[[Cohort, Reply], str | None]] = {
    "metric-names": _metric_names,
    "norm": _norm,
    "direction": _direction,
}
