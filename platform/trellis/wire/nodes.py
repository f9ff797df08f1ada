"""Who may join: the allow-list, a file that is read again whenever it changes.

    # nodes.yaml
    nodes:
      hospital-1: {client: 0, token: "sha256:9f86…"}
      hospital-2: {client: 1, token: "sha256:60a3…", expires: 2027-01-31}
      camera-7: {certificate: "sha256:1a2b…"}       # a client certificate in place of a token
      hospital-3: {token: "sha256:fd61…", revoked: true}

Only digests are kept: the file tells nobody how to join.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trellis import safe_yaml
from trellis.errors import TrellisError

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Entry(BaseModel):
    """One node that may join.

    Attributes:
        client: the client of the federation it is; None lets the server choose.
        token: SHA-256 of its token.
        certificate: SHA-256 of its TLS certificate, DER.
        expires: the last day on which it may join (UTC).
        revoked: shut out, at once and for good.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    client: Annotated[int, Field(ge=0)] | None = None
    token: Digest | None = None
    certificate: Digest | None = None
    expires: date | None = None
    revoked: bool = False


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
        self._entries: dict[str, Entry] = {}
        self._read()

    def identify(self, credentials: Credentials, now: datetime | None = None) -> tuple[str, Entry]:
        """Return the name and entry of the node with these credentials.

        Raises:
            RefusedError: there is none, or it may not join any more.
        """
        self._refresh()
        token = digest(credentials.token.encode()) if credentials.token else None
        certificate = fingerprint(credentials.certificate) if credentials.certificate else None
        for name, entry in self._entries.items():
            if _same(entry.token, token) or _same(entry.certificate, certificate):
                if entry.revoked:
                    raise RefusedError(f"node {name!r} was revoked")
                if entry.expires is not None and (now or datetime.now(UTC)).date() > entry.expires:
                    raise RefusedError(f"the credentials of node {name!r} expired on {entry.expires}")
                return name, entry
        raise RefusedError(
            "no token and no certificate" if token is None and certificate is None else "unknown credentials"
        )

    def still(self, name: str) -> bool:
        """Return whether a node that joined may stay."""
        self._refresh()
        entry = self._entries.get(name)
        expired = entry is not None and entry.expires is not None and datetime.now(UTC).date() > entry.expires
        return entry is not None and not entry.revoked and not expired

    def _refresh(self) -> None:
        """Read the file again if it changed. A file that is damaged while it is being written shuts nobody out."""
        try:
            self._read()
        except TrellisError:
            self._stamp = None

    def _read(self) -> None:
        try:
            status = self.path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp == self._stamp:
                return
            raw = safe_yaml.parse(self.path.read_text(), str(self.path))
            entries = _File.model_validate(raw).nodes
        except OSError as error:
            raise TrellisError("nodes-file", f"{self.path}: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise TrellisError("nodes-file", f"{self.path}: {where}: {first['msg']}") from None
        clients = [entry.client for entry in entries.values() if entry.client is not None and not entry.revoked]
        if twice := {client for client in clients if clients.count(client) > 1}:
            raise TrellisError("nodes-file", f"{self.path}: client {min(twice)} is given to two nodes")
        self._entries, self._stamp = entries, stamp


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
