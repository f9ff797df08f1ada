"""Changes to an allow-list file, for the command line; a running server reads them by itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from trellis import safe_yaml
from trellis.errors import TrellisError, nearest
from trellis.wire.nodes import NAME, AllowList, Entry, digest, fingerprint, new_token


def admit(
    path: Path,
    node: str,
    client: int | None = None,
    expires: str | None = None,
    certificate: Path | None = None,
) -> str:
    """Put a node on the list, or give it another token, and return the token.

    Of a node that is on the list everything stays that is not given here, but that it was revoked.

    Args:
        path: the allow-list; made if it is not there.
        node: its name.
        client: which client of the federation it is.
        expires: its last day, ``YYYY-MM-DD`` (UTC).
        certificate: PEM file of the certificate that it will show; its fingerprint is noted.

    Raises:
        TrellisError: the name, the client, the date or the certificate is not acceptable, the date that stays is over,
            or the file is not an allow-list.
    """
    if not re.match(NAME, node):
        raise TrellisError("nodes-file", f"node {node!r}: a node's name is like {NAME}")
    nodes = _read(path)
    token = new_token()
    entry: dict[str, Any] = {**nodes.get(node, {}), "token": digest(token.encode())}
    entry.pop("revoked", None)
    last = Entry.model_validate(entry).expires
    if expires is None and last is not None and last < datetime.now(UTC).date():
        raise TrellisError(
            "nodes-file", f"{path}: node {node!r} expired on {last}; give its new last day with --expires"
        )
    given = {"client": client, "expires": expires, "certificate": certificate and _fingerprint(certificate)}
    nodes[node] = entry | {key: value for key, value in given.items() if value is not None}
    _write(path, nodes)
    return token


def revoke(path: Path, node: str) -> None:
    """Shut a node out.

    Raises:
        TrellisError: it is not on the list.
    """
    nodes = _read(path)
    if node not in nodes:
        raise TrellisError("nodes-file", f"{path} has no node {node!r}.{nearest(node, nodes)}")
    nodes[node]["revoked"] = True
    _write(path, nodes)


@contextmanager
def private_file(path: Path) -> Iterator[TextIO]:
    """Yield a new file that its owner alone can read; it gets its name at the end, if all went well.

    Raises:
        TrellisError: there is no such folder, or it cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise TrellisError("token-file", f"{path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _fingerprint(certificate: Path) -> str:
    try:
        return fingerprint(certificate.read_bytes())
    except OSError as error:
        raise TrellisError("certs-file", f"{certificate}: {error.strerror}") from None
    except ValueError:
        raise TrellisError("certs-file", f"{certificate} is no certificate in PEM") from None


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    AllowList(path)  # says what is wrong with it
    raw = safe_yaml.parse(path.read_text(), str(path))
    return dict(raw["nodes"])


def _write(path: Path, nodes: dict[str, Any]) -> None:
    """Replace the file in one step, and only by one that can be read."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            yaml.safe_dump({"nodes": nodes}, file, sort_keys=False)
        AllowList(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise TrellisError("nodes-file", f"{path}: {error.strerror}") from None
    except TrellisError as error:
        raise TrellisError(error.code, error.message.replace(str(temporary), str(path))) from None
    finally:
        temporary.unlink(missing_ok=True)
