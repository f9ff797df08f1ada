"""A TCP proxy that can cut, stall and slow what passes: faults of a network, made outside the product."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Proxy:
    """Forwards connections to a port. ``cut`` drops all and takes no new ones until ``mend``."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.bytes_per_second: float | None = None
        self.silent = False
        self._cut = False
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._cut = True
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            _end(*pair)

    def mend(self) -> None:
        self._cut = self.silent = False

    def close(self) -> None:
        self._listener.close()
        self._pairs, pairs = [], self._pairs
        for pair in pairs:
            for end in pair:
                end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._cut:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.target))
            self._pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                while self.silent:  # the cable is out: nothing passes, nothing is closed
                    time.sleep(0.01)
                if self.bytes_per_second:
                    time.sleep(len(data) / self.bytes_per_second)
                sink.sendall(data)
        except OSError:
            pass
        _end(source, sink)


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):  # it may be closed already
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy(target: int) -> Iterator[Proxy]:
    made = Proxy(target)
    try:
        yield made
    finally:
        made.close()
