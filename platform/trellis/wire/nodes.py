"""Who may join: the allow-list, a file that is read again whenever it changes.

    # nodes.yaml
    nodes:
      hospital-1: {client: 0, token: "sha256:9f86…"}
      hospital-2: {client: 1, token: "sha256:60a3…", expires: 2027-01-31}
      camera-7: {certificate: "sha256:1a2b…"}       # a client certificate in place of a token, or beside it
      hospital-3: {token: "sha256:fd61…", revoked: true}

Only digests are kept: the file tells nobody how to join.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trellis import safe_yaml
from trellis.errors import TrellisError

log = logging.getLogger("trellis.link")

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Entry(BaseModel):
    """One node that may join.

    Attributes:
        client: the client of the federation it is; None lets the server choose.
        token: SHA-256 of its token.
        certificate: SHA-256 of its TLS certificate, DER. With a token it has to show both.
        expires: the last day on which it may join (UTC).
        revoked: shut out, at once and for good.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    client: Annotated[int, Field(ge=0)] | None = None
    token: Digest | None = None
    certificate: Digest | None = None
    expires: date | None = None
    revoked: bool = False

    def fits(self, token: str | None, certificate: str | None) -> bool:
        """Return whether these are the digests it asks for: all of them."""
        wanted = [(self.token, token), (self.certificate, certificate)]
        return any(kept for kept, _ in wanted) and all(kept is None or _same(kept, shown) for kept, shown in wanted)

    def expired(self, now: datetime | None = None) -> bool:
        """Return whether its last day is over."""
        return self.expires is not None and (now or datetime.now(UTC)).date() > self.expires

    @property
    def credential(self) -> str:
        """What it asks for, so that a change of it is noticed."""
        return f"{self.token} {self.certificate}"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    nodes: dict[Annotated[str, Field(pattern=NAME)], Entry]


class RefusedError(Exception):
    """A caller that may not in. ``str`` is the reason, which names no secret."""


@dataclass(frozen=True)
class Credentials:
    """What a caller showed: a bearer token, a client certificate (PEM), or nothing."""

    token: str | None = None
    certificate: bytes | None = None


class AllowList:
    """The nodes of a file.

    Args:
        path: the file.

    Raises:
        TrellisError: the file cannot be read, or is not an allow-list.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._bad: tuple[int, int] | None = None
        self._entries = self._read()

    def identify(self, credentials: Credentials, now: datetime | None = None) -> tuple[str, Entry, str]:
        """Return the name and entry of the node with these credentials, and what stands for them in ``objection``.

        An entry with a token and a certificate wants both.

        Raises:
            RefusedError: there is none, or it may not join any more.
        """
        self.refresh()
        token = digest(credentials.token.encode()) if credentials.token else None
        certificate = fingerprint(credentials.certificate) if credentials.certificate else None
        for name, entry in self._entries.items():
            if entry.fits(token, certificate):
                if entry.revoked:
                    raise RefusedError(f"node {name!r} was revoked")
                if entry.expired(now):
                    raise RefusedError(f"the credentials of node {name!r} expired on {entry.expires}")
                return name, entry, entry.credential
        raise RefusedError(
            "no token and no certificate" if token is None and certificate is None else "unknown credentials"
        )

    def objection(self, name: str, credential: str | None, client: int) -> str:
        """Return why a node that joined may not stay as the client it is, "" if it may. ``refresh`` before."""
        entry = self._entries.get(name)
        if entry is None or entry.revoked:
            return "its credentials were revoked"
        if entry.expired():
            return f"its credentials expired on {entry.expires}"
        if entry.credential != credential:
            return "its credentials were replaced"
        if entry.client not in (None, client):
            return f"the allow-list makes it client {entry.client}"
        return ""

    def reserved(self, name: str) -> set[int]:
        """Return the clients that the list gives to other nodes."""
        return {
            entry.client
            for other, entry in self._entries.items()
            if other != name and entry.client is not None and not entry.revoked
        }

    def refresh(self) -> None:
        """Read the file again if it changed. One that cannot be read changes nothing, and is told of once.

        It may be in the middle of being written; but whoever revokes a node in a file with a mistake has to know.
        """
        try:
            self._entries = self._read()
            self._bad = None
        except TrellisError as error:
            stamp = self._stamp_now()
            if self._bad != (stamp or (0, 0)):
                self._bad = stamp or (0, 0)
                log.error("allow-list not read; what it said before holds", extra={"reason": error.message})

    def _stamp_now(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size

    def _read(self) -> dict[str, Entry]:
        try:
            status = self.path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp == self._stamp:
                return self._entries
            if stamp == self._bad:
                raise TrellisError("nodes-file", f"{self.path} has not been mended")
            raw = safe_yaml.parse(self.path.read_text(), str(self.path))
            entries = _File.model_validate(raw).nodes
        except OSError as error:
            raise TrellisError("nodes-file", f"{self.path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise TrellisError("nodes-file", f"{self.path} is not text in UTF-8") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise TrellisError("nodes-file", f"{self.path}: {where}: {first['msg']}") from None
        clients = [entry.client for entry in entries.values() if entry.client is not None and not entry.revoked]
        if twice := {client for client in clients if clients.count(client) > 1}:
            raise TrellisError("nodes-file", f"{self.path}: client {min(twice)} is given to two nodes")
        self._stamp = stamp
        return entries


def new_token() -> str:
    """Return a fresh token of 256 random bits."""
    return secrets.token_urlsafe(32)


def digest(secret: bytes) -> str:
    """Return what an allow-list keeps of a secret. Tokens are random and long, so a plain hash is enough."""
    return f"sha256:{hashlib.sha256(secret).hexdigest()}"


def fingerprint(pem: bytes) -> str:
    """Return what an allow-list keeps of a certificate in PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    return digest(x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER))


def bearer(metadata: Mapping[str, str]) -> str | None:
    """Return the token of a call's metadata."""
    scheme, _, token = metadata.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _same(kept: str | None, shown: str | None) -> bool:
    return kept is not None and shown is not None and hmac.compare_digest(kept, shown)
