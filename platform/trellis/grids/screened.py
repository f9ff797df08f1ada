"""The admission gate: a layer that lets a strategy see only replies it can merge.

One broken or hostile client can turn a weighted average into NaN, take it over, or end the run. Here its
reply is replaced by an error with the reason, as if the client had failed, and the round goes on without it
if its quorum holds. What is checked stands in ``_checks`` (a reply by itself) and ``_cohort`` (beside the
others), one function per code; what those checks cannot see is said there too.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from trellis import flower
from trellis.grids._checks import Expected, Reply, category, expected_of, offence, values_of
from trellis.grids._cohort import MEMORY, Cohort
from trellis.grids._updates import Layout, Values, layout_of
from trellis.grids.base import Layer
from trellis.scenario import Screening

PARDONED = ("quarantined", "direction")
"""Codes that do not count towards quarantine: no new offence, and a suspicion that honest clients with rare
data may fall under. Every other code is something an honest client does not do, or hardly ever."""

ExpectedOf = Callable[[Message], Expected | None]
ProblemWith = Callable[[Message, Message], str | None]
_Payload = tuple[Expected, Values, Layout | None]


@dataclass
class _Ledger:
    """What was sent in one call, what of it is unanswered, and what came that answers nothing."""

    sent: Iterable[Message]
    closed: set[str] = field(default_factory=set)
    breaches: dict[str | int, str] = field(default_factory=dict)

    @cached_property
    def open(self) -> dict[str, Message]:
        """Unanswered messages by id. Made when the first reply is there: by then the grid has given out ids."""
        return {message.metadata.message_id: message for message in self.sent}

    def breach(self, reply: Message) -> tuple[str, str] | None:
        """Return code and reason if a reply answers no open message of ours."""
        said = reply.metadata
        answered = said.reply_to_message_id
        if answered in self.closed:
            return "duplicate", "a second reply to one message"
        sent = self.open.get(answered)
        source = flower.client_of(said.src_node_id)
        if sent is None:
            reason = f"client {source} replied to a message that was not sent"
            self.breaches.setdefault(said.src_node_id, reason)
            return "protocol", reason
        if said.src_node_id != sent.metadata.dst_node_id:
            reason = f"the reply of client {flower.client_of(sent.metadata.dst_node_id)} says it is client {source}'s"
        elif said.run_id != sent.metadata.run_id:
            reason = f"the reply is of run {said.run_id}, not {sent.metadata.run_id}"
        elif not reply.has_content() and not reply.has_error():
            reason = "the reply is empty"
        else:
            return None
        self.breaches.setdefault(answered, reason)
        return "protocol", reason

    def close(self, reply: Message) -> Message:
        """Take a reply off the ledger; return the message it answers."""
        self.closed.add(reply.metadata.reply_to_message_id)
        return self.open.pop(reply.metadata.reply_to_message_id)


class Screened(Layer):
    """Admit replies that a strategy can merge; replace the others by errors that say what is wrong.

    A reply is yielded as it came, or as ``flower.refusal(reply, "code: reason")``. Errors pass untouched.
    ``stream`` yields one reply per message whatever the inner grid does: a message without a valid reply
    gets an error at the end. A reply that answers nothing (a message never sent, another client's, a second
    time) is dropped and counted, and does not use up the message, so nobody can speak in another's place.
    At most six replies of a round are held back, to be judged jointly (see ``_cohort``); those admitted
    keep their order of arrival, and what is decided depends on nothing but that order.

    Args:
        inner: where the clients are. Replies should come in a fixed order, or decisions will vary with it.
        settings: the scenario's ``screening``.
        expected: returns, for a message, the arrays its reply must hold; None (the default for every
            message) means those that were sent for "train", and leaves them open for "query".
        problem_with: what the strategy itself finds wrong with the content of a reply, given the message that was
            sent and the reply, as ``"code: reason"``; None if nothing. Asked after the gate's own checks.
        folder: where large replies are held back; None for the system's temporary folder.

    Attributes:
        offences: refused replies by client number, without those of a code in ``PARDONED``; quarantine starts
            at ``settings.quarantine_after``.
        norms: norms of admitted updates in earlier rounds, by message type; the median's memory.
        counts: refusals by code.
        measured: norm and cosine with the cohort by id of the message answered, for every update that
            reached the comparison with its cohort. The caller empties it.
    """

    def __init__(
        self,
        inner: Grid,
        settings: Screening,
        *,
        expected: ExpectedOf | None = None,
        problem_with: ProblemWith | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(inner)
        self.folder = folder
        self.settings = settings
        self.expected = expected
        self.problem_with = problem_with
        self.offences: dict[int, int] = {}
        self.norms: dict[str, deque[float]] = {}
        self.counts: Counter[str] = Counter()
        self.measured: dict[str, tuple[float, float | None]] = {}
        self._pushed: list[Message] = []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep, as plain JSON data: offences and norms."""
        return {
            "offences": {str(client): count for client, count in self.offences.items()},
            "norms": {kind: list(norms) for kind, norms in self.norms.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` returned."""
        self.offences = {int(client): count for client, count in state["offences"].items()}
        self.norms = {kind: deque(norms, MEMORY) for kind, norms in state["norms"].items()}

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        sent = list(messages)
        replies = super().stream(sent, timeout=timeout)
        return self._screen(sent, replies) if self.settings.enabled else replies

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        ids = list(super().push_messages(sent))
        if self.settings.enabled:
            self._pushed.extend(sent)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come, screened. Those of one call are one cohort."""
        replies = super().pull_messages(message_ids)
        if not self.settings.enabled:
            return replies
        ledger = _Ledger(self._pushed)
        admitted = list(self._admitted(ledger, replies))
        self._pushed = list(ledger.open.values())
        return admitted

    def _screen(self, sent: list[Message], replies: Iterator[Message]) -> Iterator[Message]:
        ledger = _Ledger(sent)
        yield from self._admitted(ledger, replies)
        for number, message in ledger.open.items():
            breach = ledger.breaches.get(number) or ledger.breaches.get(message.metadata.dst_node_id)
            if breach is None:
                yield flower.failure(message, flower.FAILED_DEADLINE, "no reply came")
            else:
                self._blame(message.metadata.dst_node_id)
                yield flower.failure(message, flower.REFUSED, f"protocol: {breach}")

    def _admitted(self, ledger: _Ledger, replies: Iterable[Message]) -> Iterator[Message]:
        """Judge replies as they come: protocol, quarantine, the reply by itself, then beside its cohort."""
        cohorts: dict[str, Cohort] = {}
        payloads: dict[int, _Payload] = {}
        for message in replies:
            if breach := ledger.breach(message):
                self.counts[breach[0]] += 1
            else:
                yield from self._judged(message, ledger.close(message), cohorts, payloads)
            del message  # or it would be held while the next one is made
        for cohort in cohorts.values():
            yield from self._decided(cohort.finish())

    def _judged(
        self, message: Message, to: Message, cohorts: dict[str, Cohort], payloads: dict[int, _Payload]
    ) -> Iterator[Message]:
        """Yield what is decided now that one more reply is there."""
        if message.has_error():
            yield message
            return
        reason = self._quarantined(to)
        if reason is None:
            reply = self._reply(message, to, payloads)
            reason = self._offence(reply)
        if reason is not None:
            yield self._refuse(message, reason)
        elif category(to) == "query":
            yield message
        else:
            yield from self._decided(self._cohort(cohorts, to).take(reply))

    def _decided(self, decisions: Iterable[tuple[Reply, str | None]]) -> Iterator[Message]:
        for reply, reason in decisions:
            if category(reply.to) == "train":
                self.measured[reply.message.metadata.reply_to_message_id] = (reply.measured.norm, reply.cosine)
            yield reply.message if reason is None else self._refuse(reply.message, reason)

    def _reply(self, message: Message, to: Message, payloads: dict[int, _Payload]) -> Reply:
        # A payload is usually shared by all messages of a round: read it once.
        if id(to.content) not in payloads:
            sent = values_of(to.content)
            payloads[id(to.content)] = expected_of(to), sent, layout_of(sent)
        as_sent, values, layout = payloads[id(to.content)]
        expected = self.expected(to) if self.expected else None
        if expected is None and category(to) == "train":
            expected = as_sent
        return Reply(message, to, self.settings, expected, values, layout)

    def _cohort(self, cohorts: dict[str, Cohort], to: Message) -> Cohort:
        kind = to.metadata.message_type
        if kind not in cohorts:
            updates = category(to) == "train"
            history = self.norms.setdefault(kind, deque(maxlen=MEMORY)) if updates else deque[float]()
            cohorts[kind] = Cohort(self.settings, history, updates=updates, folder=self.folder)
        return cohorts[kind]

    def _offence(self, reply: Reply) -> str | None:
        try:
            found = offence(reply)
            return self.problem_with(reply.to, reply.message) if found is None and self.problem_with else found
        except Exception as error:  # whatever a stranger's reply makes a check raise must not end the round
            return f"unreadable: {type(error).__name__} while reading the reply"

    def _quarantined(self, to: Message) -> str | None:
        after = self.settings.quarantine_after
        count = self.offences.get(flower.client_of(to.metadata.dst_node_id), 0)
        return f"quarantined: {count} replies were refused before" if after is not None and count >= after else None

    def _refuse(self, message: Message, reason: str) -> Message:
        code = reason.partition(":")[0]
        self.counts[code] += 1
        if code not in PARDONED:
            self._blame(message.metadata.src_node_id)
        return flower.refusal(message, reason)

    def _blame(self, node: int) -> None:
        client = flower.client_of(node)
        self.offences[client] = self.offences.get(client, 0) + 1
