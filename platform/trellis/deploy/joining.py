"""What a node is told on its command line, turned into what the link takes. No torch, no Flower."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from trellis.deploy.loopback import is_loopback
from trellis.errors import TrellisError


@dataclass(frozen=True)
class Where:
    """The server, and what the node shows it.

    Attributes:
        address: host and port.
        ca: the authority that signed the server's certificate, PEM.
        certificate: the node's own, PEM; its key lies beside it under the same name with ``.key``.
        token: bearer token.
        insecure: plain text. A token is never sent over it to another machine.
        beyond_loopback: allow plain text to another machine.
    """

    address: str
    ca: Path | None = None
    certificate: Path | None = None
    token: str | None = field(default=None, repr=False)
    insecure: bool = False
    beyond_loopback: bool = False

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Return what the channel needs for TLS; None for plain text.

        Raises:
            TrellisError: neither TLS nor --insecure was asked for, --insecure leads to another machine, or a file
                cannot be read.
        """
        if ":" not in self.address:
            raise TrellisError("usage", f"the server's address is host:port, not {self.address!r}")
        if self.insecure:
            local = is_loopback(self.address)
            if self.token and not local:
                raise TrellisError(
                    "join-insecure-token",
                    f"--insecure would show this node's token to all on the way to {self.address}",
                )
            if not local and not self.beyond_loopback:
                raise TrellisError(
                    "join-insecure",
                    f"--insecure to {self.address} would show all on the way what this node trains, and let them answer"
                    " in the server's place; use --ca, or say --insecure-beyond-loopback too",
                )
            return None
        if self.ca is None:
            raise TrellisError(
                "join-no-ca", "give --ca with the server's authority (ca.pem), or --insecure on loopback"
            )
        key = chain = None
        if self.certificate is not None:
            chain, key = _bytes(self.certificate), _bytes(self.certificate.with_suffix(".key"))
        return grpc.ssl_channel_credentials(_bytes(self.ca), key, chain)


@dataclass(frozen=True)
class NodeConfig:
    """Which client the node wants to be, and changes of the scenario that hold for this node only."""

    client: int | None = None
    overrides: tuple[str, ...] = ()


def token(file: Path | None, otherwise: str | None = None) -> str | None:
    """Return the token that a file holds; without a file, the other one, e.g. of the environment.

    Raises:
        TrellisError: the file cannot be read, or holds no token.
    """
    if file is None:
        return otherwise
    try:
        held = file.read_text("ascii").strip()
    except OSError as error:
        raise TrellisError("token-file", f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        held = ""
    if not held or any(not "!" <= letter <= "~" for letter in held):
        raise TrellisError("token-file", f"{file} holds no token, which is one line of `trellis token NODE`")
    return held


def private(folder: Path) -> Path:
    """Make a node's folder so that others on its machine cannot look into it; one that is there stays as it is.

    Raises:
        TrellisError: it cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise TrellisError("node-store", f"{folder}: {error.strerror}") from None
    return folder


def node_config(text: str) -> NodeConfig:
    """Read ``client=3 data.path=/data/mine.npz``. Only what is local to a node may be changed: its data and device.

    Raises:
        TrellisError: a pair is not ``key=value``, or changes what all must have alike.
    """
    client: int | None = None
    overrides = []
    for pair in shlex.split(text):
        key, equals, value = pair.partition("=")
        if not equals:
            raise TrellisError("usage", f"--node-config: {pair!r} is not KEY=VALUE")
        if key == "client":
            if not value.isdigit():
                raise TrellisError("usage", f"--node-config: client is {value!r}, not a number")
            client = int(value)
        elif key == "data" or key.startswith(("data.", "runtime.device", "runtime.threads")):
            overrides.append(pair)
        else:
            raise TrellisError(
                "usage",
                f"--node-config: {key!r} is the server's to say; a node may change data, runtime.device and"
                " runtime.threads",
            )
    return NodeConfig(client, tuple(overrides))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrellisError("certs-file", f"{path}: {error.strerror}") from None
