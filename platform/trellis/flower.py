"""Every place where Trellis touches Flower beneath its public names, in one file.

Written for flwr 1.41. tests/platform/test_flower.py fails when a new Flower changes any of it:

- a ``Message`` can be made only after ``TaskIdentity`` carries task, run and node ids;
- a message made over from another keeps its metadata through a keyword that is not public;
- a message's id is set by whoever transports it, through its metadata's ``__dict__``;
- a ``Grid`` holds a ``Run``, which lives in ``flwr.supercore``;
- Flower logs through one process-wide logger and reports use to its makers unless told not to.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable
from typing import Any

# Before Flower and Ray are imported: neither reports anything to its makers from a run of ours.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import Error, Message, RecordDict
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1
FIRST_CLIENT_NODE = 1000

FAILED_CLIENT = 2  # ErrorCode.CLIENT_APP_RAISED_EXCEPTION
FAILED_WORKER = 8  # ErrorCode.CLIENT_APP_CRASHED
FAILED_DEADLINE = 4  # ErrorCode.REPLY_MESSAGE_UNAVAILABLE
REFUSED = 6  # ErrorCode.MOD_FAILED_PRECONDITION: content was there and was not admitted

_numbers = itertools.count(1)


def enter_run(run_id: int = 1, node_id: int = SERVER_NODE) -> Run:
    """Give this process the identity that Flower needs to make messages, and return an empty run."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    return Run.create_empty(run_id)


def quiet(level: int = logging.WARNING) -> None:
    """Keep Flower's own progress lines out of the terminal; its warnings stay."""
    logging.getLogger("flwr").setLevel(level)


def node_of(client: int) -> int:
    """Return the Flower node id of a client number on our own grids."""
    return FIRST_CLIENT_NODE + client


def client_of(node_id: int) -> int:
    """Return the client number of a node id; a node of a foreign grid keeps its id."""
    return node_id - FIRST_CLIENT_NODE if FIRST_CLIENT_NODE <= node_id < FIRST_CLIENT_NODE + 2**40 else node_id


def number(messages: Iterable[Message]) -> list[Message]:
    """Give every message without an id one that is unique in this process."""
    result = list(messages)
    for message in result:
        if not message.metadata.message_id:
            rename(message, f"m{next(_numbers)}")
    return result


def rename(message: Message, message_id: str) -> None:
    """Give a message another id."""
    message.metadata.__dict__["_message_id"] = message_id


def rename_reply(reply: Message, reply_to: str) -> None:
    """Say which message a reply answers."""
    reply.metadata.__dict__["_reply_to_message_id"] = reply_to


def reply(content: RecordDict, to: Message) -> Message:
    """Return a reply with content."""
    return Message(content, reply_to=to)


def failure(to: Message, code: int, reason: str) -> Message:
    """Return a reply that carries an error in place of content. ``to`` is the message that was sent."""
    return Message(Error(code, reason), reply_to=to)


def refusal(of: Message, reason: str) -> Message:
    """Return an error in the place of a reply that was not admitted, with the same source and ids."""
    return _with_metadata(of, error=Error(REFUSED, reason))


def with_content(of: Message, content: RecordDict) -> Message:
    """Return a message with the same ids and addresses and other content."""
    return _with_metadata(of, content=content)


def _with_metadata(of: Message, **parts: RecordDict | Error) -> Message:
    make: Any = Message  # the keyword ``metadata`` exists, but is not in the public signature
    made: Message = make(metadata=of.metadata, **parts)
    return made
