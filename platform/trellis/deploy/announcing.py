"""What a server says while it runs: to a person where it listens and for whom it waits, to a log every round too."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger("trellis.server")

EVERYWHERE = ("", "0.0.0.0", "[::]")
"""Hosts that a server listens on and nobody can call."""


class Announcer(Protocol):
    """What ``serving.grids`` and the command line call."""

    def listening(self, port: int) -> None:
        """Say that nodes may come."""

    def waiting(self, there: int, needed: int) -> None:
        """Say how many clients are there, of those that the first round waits for."""

    def note(self, text: str) -> None:
        """Say anything else."""

    def round(self, cell: str, line: Mapping[str, Any]) -> None:
        """Say how a round went, as it stands in ``metrics.jsonl``."""


class Spoken:
    """To a person, who sees rounds elsewhere.

    Args:
        address: that the server was told to listen on.
        options: of ``trellis join`` beside the address.
        names: of the server, by its certificate.
        tell: prints a line.
    """

    def __init__(self, address: str, options: str, names: Sequence[str], tell: Callable[[str], None]) -> None:
        self.host = address.rpartition(":")[0]
        self.options, self.names, self.tell = options, names, tell

    def listening(self, port: int) -> None:
        called = self.host
        if self.host in EVERYWHERE:
            called = next((name for name in self.names if name not in ("localhost", "127.0.0.1")), socket.gethostname())
        self.tell(f"Listening on {self.host}:{port}. Nodes join with: trellis join {called}:{port} {self.options}")

    def waiting(self, there: int, needed: int) -> None:
        self.tell(f"{'waiting' if there < needed else 'all here'}: {there} of {needed} clients are there")

    def note(self, text: str) -> None:
        self.tell(text)

    def round(self, cell: str, line: Mapping[str, Any]) -> None:
        """Leave it to the progress display."""


class Logged:
    """To a log.

    Args:
        run: its name.
    """

    def __init__(self, run: str) -> None:
        self.run = run

    def listening(self, port: int) -> None:
        log.info("listening", extra={"run": self.run, "port": port})

    def waiting(self, there: int, needed: int) -> None:
        log.info("waiting", extra={"run": self.run, "there": there, "needed": needed})

    def note(self, text: str) -> None:
        log.info(text, extra={"run": self.run})

    def round(self, cell: str, line: Mapping[str, Any]) -> None:
        figures = {
            f"{group}-{name}": value
            for group in ("train", "central", "federated")
            for name, value in (line[group] or {}).items()
        }
        said = {key: line[key] for key in ("round", "cohort", "replies", "bytes_down", "bytes_up")}
        said |= {"seconds": round(line["seconds"], 3), "failed": len(line["failures"]), "figures": figures}
        log.info("round", extra={"run": self.run, "cell": cell, **said})


def join_options(authority: bool, allowed: bool, mutual: bool) -> str:
    """Return what a node has to give beside the address, with words in capitals for what is its own."""
    parts = ["--ca ca.pem" if authority else "--insecure"]
    parts += ["--cert NODE.pem"] if mutual else []
    parts += ["--token-file TOKEN"] if allowed else []
    return " ".join(parts)


def names_of(certificate: Path) -> list[str]:
    """Return the names and addresses that a certificate (PEM) is for."""
    from cryptography import x509

    try:
        read = x509.load_pem_x509_certificate(certificate.read_bytes())
        names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
