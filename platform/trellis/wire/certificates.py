"""A certificate authority of one's own, for development and small fleets: ``trellis certs``.

Elliptic keys (P-256), one certificate for the server and one for each named node. A fleet with a PKI brings its own
files; nothing else in the link knows where they came from.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from trellis.errors import TrellisError
from trellis.wire.nodes import NAME

CA, SERVER = "ca", "server"
LOCAL = ("localhost", "127.0.0.1")
"""Hosts of a server whose operator named none."""


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, PEM."""

    certificate: Path
    key: Path


def pair(folder: Path, name: str) -> Pair:
    """Return where a name's files are in a folder that ``write`` made."""
    return Pair(folder / f"{name}.pem", folder / f"{name}.key")


def write(folder: Path, hosts: Sequence[str] = (), nodes: Sequence[str] = (), days: int = 365) -> list[str]:
    """Write an authority, a server's certificate and one for each node.

    An authority that is there is kept. So is a server's certificate, unless hosts are given: another one in its place
    would not hold the names that nodes call the server by.

    Args:
        folder: gets ``ca.pem``, ``ca.key``, ``server.pem``, ``server.key`` and ``<node>.pem``, ``<node>.key``. Keys
            can be read by their owner only.
        hosts: names and addresses under which nodes reach the server; of a first certificate by default ``LOCAL``.
        nodes: names of nodes that get a client certificate.
        days: until the certificates expire; the authority lives ten times as long.

    Returns:
        For whom a certificate was written, the authority apart.

    Raises:
        TrellisError: a node cannot have that name, or the folder holds an authority without its key.
    """
    for node in nodes:
        if not re.match(NAME, node) or node.lower() in (CA, SERVER):
            raise TrellisError(
                "certs-name", f"node {node!r}: a node's name is like {NAME}, and neither {CA!r} nor {SERVER!r}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    authority, server = pair(folder, CA), pair(folder, SERVER)
    if authority.certificate.exists():
        if not authority.key.exists():
            raise TrellisError("certs-no-key", f"{authority.certificate} is there, but {authority.key} is not")
        issuer = x509.load_pem_x509_certificate(authority.certificate.read_bytes())
        signer = serialization.load_pem_private_key(authority.key.read_bytes(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
    else:
        signer = ec.generate_private_key(ec.SECP256R1())
        issuer = _authority(signer, 10 * days)
        _store(authority, issuer, signer)
    written = list(nodes)
    if hosts or not server.certificate.exists():
        called = hosts or LOCAL
        names = [_alternative(host) for host in called]
        _issue(server, called[0], names, ExtendedKeyUsageOID.SERVER_AUTH, issuer, signer, days)
        written.insert(0, f"{SERVER} ({', '.join(called)})")
    for node in nodes:
        _issue(pair(folder, node), node, [], ExtendedKeyUsageOID.CLIENT_AUTH, issuer, signer, days)
    return written


def _authority(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Trellis development authority")])
    return (
        _builder(name, key, days)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _issue(
    where: Pair,
    common_name: str,
    names: list[x509.GeneralName],
    use: x509.ObjectIdentifier,
    issuer: x509.Certificate,
    signer: ec.EllipticCurvePrivateKey,
    days: int,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    builder = (
        _builder(subject, key, days)
        .issuer_name(issuer.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    _store(where, builder.sign(signer, hashes.SHA256()), key)


def _builder(subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # for nodes whose clock is behind
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        key_cert_sign=sign,
        crl_sign=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _store(where: Pair, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    where.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # Made unreadable to others before a byte is in it.
    where.key.unlink(missing_ok=True)
    with os.fdopen(os.open(where.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
