"""Wrong certificates, expired tokens, old TLS, and what was recorded on the way."""

from __future__ import annotations

import contextlib
import socket
import ssl
from datetime import UTC, datetime, timedelta

import pytest
import yaml

from tcp_proxy import Proxy
from trellis.deploy import allowing
from trellis.deploy.joining import Where
from trellis.deploy.serving import link_settings
from trellis.errors import GridError
from trellis.grids.grpc import GrpcGrid
from trellis.wire import certificates
from trellis.wire.nodes import fingerprint
from trellis_clients.link.connection import Connection, Identity


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    """Two authorities, each with a server's and a node's certificate."""
    folder = tmp_path_factory.mktemp("authorities")
    certificates.write(folder / "ours", ["127.0.0.1"], ["camera", "outcast"])
    certificates.write(folder / "other", ["127.0.0.1"], ["camera"])
    certificates.write(folder / "elsewhere", ["cloud.example"])
    return folder


def outcome_of(port, node="", **identity):
    """Return the client that a node with this identity becomes, or the code it is refused with."""
    made = Connection(Identity(f"127.0.0.1:{port}", node, "i", give_up_after_s=0.5, **identity))
    try:
        return made.start().client
    except GridError as error:
        return error.code
    finally:
        made.close()


@pytest.mark.battery("B6")
def test_under_mutual_tls_a_node_shows_a_certificate_of_the_right_authority(tmp_path, authorities):
    """No certificate, one of another authority, one revoked or not on the list: out. The right one needs no token."""
    ours, other = authorities / "ours", authorities / "other"
    allow = tmp_path / "nodes.yaml"
    listed = {
        "camera": {"client": 1, "certificate": fingerprint((ours / "camera.pem").read_bytes())},
        "outcast": {"certificate": fingerprint((ours / "outcast.pem").read_bytes()), "revoked": True},
    }
    allow.write_text(yaml.safe_dump({"nodes": listed}))
    token = allowing.admit(allow, "hospital", 0)
    settings = link_settings(
        "127.0.0.1:0",
        certificate=ours / "server.pem",
        key=ours / "server.key",
        authority=ours / "ca.pem",
        nodes=allow,
        beat_s=0.3,
    )

    def tls(certificate=None):
        return Where("x:1", ca=ours / "ca.pem", certificate=certificate).credentials()

    with GrpcGrid(3, settings) as grid:
        port = grid.link.port
        assert outcome_of(port, channel_credentials=tls(ours / "camera.pem")) == 1
        assert outcome_of(port, channel_credentials=tls(), token=token) == "link-lost"
        assert outcome_of(port, channel_credentials=tls(other / "camera.pem"), token=token) == "link-lost"
        assert outcome_of(port, channel_credentials=tls(ours / "outcast.pem")) == "link-refused"
        assert outcome_of(port, channel_credentials=tls(ours / "server.pem")) in ("link-refused", "link-lost")
        assert [node.name for node in grid.link.nodes.values()] == ["camera"]


@pytest.mark.battery("B6")
def test_another_host_name_an_expired_token_and_old_tls_are_refused(tmp_path, authorities):
    """The server's certificate names another host; the token ended yesterday, or is another node's; TLS 1.1: out."""
    ours, elsewhere = authorities / "ours", authorities / "elsewhere"
    allow = tmp_path / "nodes.yaml"
    token = allowing.admit(allow, "a")
    late = allowing.admit(allow, "b", expires=(datetime.now(UTC) - timedelta(days=1)).date().isoformat())

    def server(folder):
        return link_settings("127.0.0.1:0", certificate=folder / "server.pem", key=folder / "server.key", nodes=allow)

    with GrpcGrid(2, server(elsewhere)) as grid:
        tls = Where("x:1", ca=elsewhere / "ca.pem").credentials()
        assert outcome_of(grid.link.port, channel_credentials=tls, token=token) == "link-lost"
    with GrpcGrid(2, server(ours)) as grid:
        tls = Where("x:1", ca=ours / "ca.pem").credentials()
        assert outcome_of(grid.link.port, channel_credentials=tls, token=late) == "link-refused"
        assert outcome_of(grid.link.port, channel_credentials=tls, token=token) == 0
        assert outcome_of(grid.link.port, node="b", channel_credentials=tls, token=token) == "link-refused"
        for version, welcome in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
            context = ssl.create_default_context(cafile=str(ours / "ca.pem"))
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.set_alpn_protocols(["h2"])
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = version
            with (
                socket.create_connection(("127.0.0.1", grid.link.port)) as plain,
                contextlib.nullcontext() if welcome else pytest.raises((ssl.SSLError, ConnectionError)),
                context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
            ):
                assert secure.version() == "TLSv1.2"


class Recorder(Proxy):
    """Keeps what nodes send."""

    heard = b""

    def _pump(self, source, sink):
        if any(source is near for near, _ in self._pairs):
            receive = source.recv

            class Tap:
                def recv(_, size):  # noqa: N805
                    data = receive(size)
                    self.heard += data
                    return data

                def shutdown(_, how):  # noqa: N805
                    source.shutdown(how)

            super()._pump(Tap(), sink)
        else:
            super()._pump(source, sink)


@pytest.mark.battery("B6")
def test_what_was_recorded_on_the_way_opens_nothing(tmp_path, authorities):
    """The bytes of a node's whole visit are sent once more: no session, no answer comes of it."""
    ours, allow = authorities / "ours", tmp_path / "nodes.yaml"
    token = allowing.admit(allow, "a")
    events: list[str] = []
    settings = link_settings("127.0.0.1:0", certificate=ours / "server.pem", key=ours / "server.key", nodes=allow)
    with GrpcGrid(1, settings, counted=lambda event, _: events.append(event)) as grid:
        recorder = Recorder(grid.link.port)
        tls = Where("x:1", ca=ours / "ca.pem").credentials()
        assert outcome_of(recorder.port, channel_credentials=tls, token=token) == 0
        recorder.close()
        assert events.count("join") == 1
        assert len(recorder.heard) > 500
        assert token.encode() not in recorder.heard
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", grid.link.port), timeout=10) as replay:
                replay.sendall(recorder.heard)
                with contextlib.suppress(ConnectionError):
                    while replay.recv(4096):  # until the server ends it
                        pass
        assert events.count("join") == 1
        assert outcome_of(grid.link.port, channel_credentials=tls, token=token) == 0
