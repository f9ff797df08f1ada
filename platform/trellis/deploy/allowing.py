"""Changes to an allow-list file, for the command line; a running server reads them by itself."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from trellis import safe_yaml
from trellis.errors import TrellisError, nearest
from trellis.wire.nodes import NAME, AllowList, digest, new_token


def admit(path: Path, node: str, client: int | None = None, expires: str | None = None) -> str:
    """Put a node on the list, or give it another token, and return the token.

    Raises:
        TrellisError: the name, the client or the date is not acceptable, or the file is not an allow-list.
    """
    if not re.match(NAME, node):
        raise TrellisError("nodes-file", f"node {node!r}: a node's name is like {NAME}")
    nodes = _read(path)
    token = new_token()
    entry: dict[str, Any] = {"token": digest(token.encode())}
    if client is not None:
        entry["client"] = client
    if expires is not None:
        entry["expires"] = expires
    nodes[node] = entry
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


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    AllowList(path)  # says what is wrong with it
    raw = safe_yaml.parse(path.read_text(), str(path))
    return dict(raw["nodes"])


def _write(path: Path, nodes: dict[str, Any]) -> None:
    """Replace the file in one step, and only by one that can be read."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        yaml.safe_dump({"nodes": nodes}, file, sort_keys=False)
    try:
        AllowList(temporary)
    except TrellisError as error:
        temporary.unlink()
        raise TrellisError(error.code, error.message.replace(str(temporary), str(path))) from None
    os.replace(temporary, path)
