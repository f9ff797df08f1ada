"""The device's loop with the cloud: samples up, affine parameters down, over any link."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from threading import Event, Thread
from typing import Any, Protocol

from numpy.typing import NDArray

from trellis.errors import TrellisError
from trellis_clients.edge.runtime import Runtime
from trellis_clients.edge.uploads import Upload

log = logging.getLogger("trellis.edge")


class Link(Protocol):
    """A way to the cloud. A call that raises an ``OSError`` (``ConnectionError``, ``TimeoutError``) is tried again."""

    def __call__(self, uploads: Sequence[Upload]) -> Mapping[str, NDArray[Any]] | None:
        """Deliver samples; return new affine parameters, or None where there are none."""
        ...


class Agent:
    """Exchanges with the cloud every so often; whatever happens there, the device goes on answering.

    A sample is forgotten once the link took it. If a reply is lost the sample is sent again under its number, so the
    cloud sees each at least once. While the cloud is away the pause doubles up to ``longest``, with a random share so
    that devices do not come back all at once; the buffer's drop policy decides what is lost meanwhile.

    Args:
        runtime: with an upload buffer.
        link: to the cloud.
        every: seconds between exchanges.
        longest: most seconds between attempts.
        most: samples per exchange.
    """

    def __init__(
        self, runtime: Runtime, link: Link, *, every: float = 10.0, longest: float = 600.0, most: int = 64
    ) -> None:
        assert runtime.uploads is not None, "an agent sends what waits in an upload buffer"
        self.runtime, self.uploads, self.link = runtime, runtime.uploads, link
        self.every, self.longest, self.most = every, longest, most
        self.failures = 0
        self._stop = Event()
        self._thread = Thread(target=self._run, name="agent", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def exchange(self) -> bool:
        """Send what waits, take in what comes; return whether the cloud was there."""
        batch = self.uploads.take(self.most)
        numbers = [each.number for each in batch]
        try:
            arrays = self.link(batch)
        except OSError as error:
            self.uploads.back(numbers)
            self.failures += 1
            log.warning("the cloud is away (%d times now): %s", self.failures, error)
            return False
        except BaseException:
            self.uploads.back(numbers)
            raise
        self.failures = 0
        self.uploads.sent(numbers)
        metrics = self.runtime.metrics
        metrics.uploads.labels("sent").inc(len(batch))
        metrics.upload_items.set(len(self.uploads))
        metrics.upload_bytes.set(self.uploads.nbytes)
        if arrays is not None:
            try:
                self.runtime.swap_affine(arrays)
            except TrellisError as error:
                log.error("the cloud's affine parameters were refused: %s", error)
        return True

    def pause(self) -> float:
        """Return how many seconds to wait before the next exchange."""
        if not self.failures:
            return self.every
        return min(self.every * 2.0 ** min(self.failures, 30), self.longest) * random.uniform(0.5, 1.0)

    def _run(self) -> None:
        while not self._stop.wait(self.pause()):
            try:
                self.exchange()
            except Exception:  # a fault in the link must not end the loop
                self.failures += 1
                log.exception("the exchange with the cloud failed")
