"""The one family of exceptions that users can cause.

Every error carries a short, stable code (listed in docs/errors.md) and a message of one line that names
the key, the value, what is allowed and, where a name was mistyped, the nearest right one. Broken
invariants are ``assert``s instead, because no user can mend them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrellisError(Exception):
    """A mistake or condition the user can mend. ``str(error)`` is one line, ready to print."""

    exit_status = 2

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = " ".join(message.split())

    def __reduce__(self) -> tuple[type[TrellisError], tuple[str, str]]:
        # Exceptions cross process boundaries on a Ray grid; the default would lose the code.
        return type(self), (self.code, self.message)

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class ScenarioError(TrellisError):
    """The scenario file, or an override of it, does not say something that can be run."""


class PluginError(TrellisError):
    """A trainer, strategy, data set, partitioner or model could not be found, imported or used."""


class DataError(TrellisError):
    """Data are missing, malformed, or of a kind the trainer does not take."""


class GridError(TrellisError):
    """Clients cannot be reached: no Ray, no worker, a grid that was closed."""

    exit_status = 1


class RoundError(TrellisError):
    """A round ended without its quorum. The run's folder stays readable and resumable."""

    exit_status = 1


class RunError(TrellisError):
    """A run's folder is missing, incomplete, damaged, or belongs to another scenario."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def listed(names: Iterable[str]) -> str:
    """Return names as ``'a', 'b', 'c'``, sorted, for the "allowed" part of a message."""
    return ", ".join(repr(name) for name in sorted(names))
