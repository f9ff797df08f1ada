"""Structured logs of deployed processes: one line an event, with the run, round, node and task it is about.

Secrets have no field here, and no other field is printed: what a log record carries beyond ``FIELDS`` stays out.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

FIELDS = (
    "run",
    "cell",
    "round",
    "node",
    "client",
    "task",
    "kind",
    "verdict",
    "seconds",
    "reason",
    "pause",
    "peer",
    "software",
    "port",
    "there",
    "needed",
    "cohort",
    "replies",
    "failed",
    "bytes_down",
    "bytes_up",
    "figures",
)


class Json(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self.role,
            "event": record.getMessage(),
            **{name: getattr(record, name) for name in FIELDS if hasattr(record, name)},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Plain(logging.Formatter):
    """For a person: the time, the event, and what it is about."""

    def format(self, record: logging.LogRecord) -> str:
        about = " ".join(f"{name}={getattr(record, name)}" for name in FIELDS if hasattr(record, name))
        about = "".join(c if c.isprintable() else "?" for c in about)  # a node's own words could pretend to be a line
        text = f"{datetime.fromtimestamp(record.created).strftime('%H:%M:%S')} {record.getMessage()} {about}".rstrip()
        return text + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


def configure(as_json: bool, role: str, level: int = logging.INFO) -> None:
    """Log Trellis's own events to stderr; other libraries' warnings too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json(role) if as_json else Plain())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("trellis").setLevel(level)
    logging.captureWarnings(as_json)  # Python's own warnings are lines of the log too
    if not as_json:
        logging.getLogger("trellis.link.tasks").setLevel(logging.WARNING)  # a line a task: for machines
