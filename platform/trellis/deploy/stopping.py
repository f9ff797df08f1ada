"""What SIGTERM and Ctrl-C do to the process of a node: it ends what it is at, within a time, and leaves.

The handlers are there before anything heavy is imported: in a container without an init a process is PID 1, for which
the kernel drops a SIGTERM that has no handler. No torch, no Flower.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

LAST_S = 1.5
"""Of the time there is, kept for a word to the server."""

AT_ONCE = 1
"""Exit status after a second signal, or if something could not be kept."""


class Stopping:
    """Takes SIGTERM and SIGINT from now on.

    Before there is something to stop the process ends at once. After that the first signal calls what ``during`` was
    given, and the second ends the process at once.

    Args:
        status: what a node that was told to stop before the run was over exits with.
        grace_s: from the first signal on; then the process ends, whatever it is at.
    """

    def __init__(self, status: int = 0, grace_s: float = 10.0) -> None:
        self.status, self.grace_s = status, grace_s
        self._asked = False
        self._over = threading.Event()
        self._stop: Callable[[], None] | None = None
        self._leave: Callable[[], int] = lambda: AT_ONCE
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._signalled) for number in (signal.SIGTERM, signal.SIGINT)
            }

    @contextmanager
    def during(self, stop: Callable[[], None], leave: Callable[[], int]) -> Iterator[None]:
        """Be at work. Afterwards a first signal changes nothing any more: the process is at its end.

        Args:
            stop: asks the work to end; called from a thread.
            leave: called where it does not end in time, just before the process does; returns its exit status.
        """
        self._stop, self._leave = stop, leave
        try:
            yield
        finally:
            self._over.set()

    def restore(self) -> None:
        """Have signals do again what they did before, for a process that goes on; not if one came: it has to end."""
        if not self._asked:
            for number, before in self._before.items():
                signal.signal(number, signal.SIG_DFL if before is None else before)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._asked:
            os._exit(AT_ONCE)
        if self._over.is_set():
            return
        self._asked = True
        if self._stop is None:
            self._exit(self.status)
        threading.Thread(target=self._end, name="trellis-node-stop", daemon=True).start()

    def _end(self) -> None:
        end = time.monotonic() + self.grace_s
        last = threading.Timer(self.grace_s, os._exit, (AT_ONCE,))  # also if what follows does not return
        last.daemon = True
        last.start()
        assert self._stop is not None
        self._stop()
        if not self._over.wait(max(end - LAST_S - time.monotonic(), 0.0)):
            status = self._leave()
            if not self._over.wait(0.2):
                self._exit(status)
        last.cancel()

    @staticmethod
    def _exit(status: int) -> None:
        with suppress(OSError):
            os.write(1, b"stopped\n")  # past the buffer, which what was interrupted may be writing to
        os._exit(status)
