"""Clients in this very process, one after another: for tests, breakpoints and small machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from trellis import flower
from trellis.grids.base import ClientGrid


class LocalGrid(ClientGrid):
    """Run an unmodified Flower ``ClientApp`` in this process.

    A client cannot be interrupted here: one that outlasts the deadline is waited for, and only the clients
    after it are cut. ``RayGrid`` can stop a client.

    Args:
        app: the client app.
        num_clients: clients get node ids from ``flower.node_of(0)`` on and ``partition-id`` from 0 on.
        after_reply: called with every reply as the client made it, before it is passed on.
    """

    def __init__(
        self, app: ClientApp, num_clients: int, *, after_reply: Callable[[Message], None] | None = None
    ) -> None:
        super().__init__(num_clients)
        self.app = app
        self.after_reply = after_reply

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        end = None if timeout is None else time.monotonic() + timeout
        for message in flower.number(messages):
            if end is not None and time.monotonic() > end:
                yield flower.failure(message, flower.FAILED_DEADLINE, f"no turn before the deadline of {timeout:g} s")
                continue
            client = flower.client_of(message.metadata.dst_node_id)
            reply, state = run_client(self.app, message, self.context(client, self.run.run_id))
            self.keep_state(client, state)
            if self.after_reply:
                self.after_reply(reply)
            yield reply
            del reply  # or it would be held while the next client is at work

    def context(self, client: int, run_id: int) -> Context:
        """Return a client's Flower context: who it is, and the state it keeps from round to round."""
        return client_context(client, len(self._nodes), self.states.get(client), run_id)


def client_context(client: int, num_clients: int, state: RecordDict | None, run_id: int) -> Context:
    """Return the context of a simulated client. ``state`` is used as it is, not copied."""
    return Context(
        run_id=run_id,
        node_id=flower.node_of(client),
        node_config={"partition-id": client, "num-partitions": num_clients},
        state=RecordDict() if state is None else state,
        run_config={},
    )


def run_client(app: ClientApp, message: Message, context: Context) -> tuple[Message, RecordDict]:
    """Call the client app; whatever it raises becomes an error reply, and its state stays as it was."""
    kept = context.state.copy()
    try:
        reply = app(_own_copy(message), context)
        if not isinstance(reply, Message):
            raise TypeError(f"the client returned {type(reply).__name__}, not a reply")
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return flower.failure(message, flower.FAILED_CLIENT, reason), kept
    return reply, context.state


def _own_copy(message: Message) -> Message:
    """Return the message with records of its own, so that no client changes what another reads.

    The arrays in them are shared: they are read-only.
    """
    content = RecordDict({name: record.copy() for name, record in message.content.items()})
    return flower.with_content(message, content)
