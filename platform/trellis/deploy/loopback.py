"""Does an address stay on this machine? Plain text goes no further unless an operator insists."""

from __future__ import annotations

import ipaddress


def is_loopback(address: str) -> bool:
    """Return whether ``host:port`` or ``unix:path`` can be reached from this machine alone.

    A name other than ``localhost`` may lead anywhere, ``127.0.0.1.example.org`` too, so only literal addresses of the
    loopback networks count.
    """
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
