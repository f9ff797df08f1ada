"""Who may join: allow-list, tokens, certificates, and the options that keep a link closed."""

from __future__ import annotations

import logging
import stat
from datetime import UTC, datetime

import pytest
from cryptography import x509

from trellis.deploy import allowing, logs
from trellis.deploy.joining import Where
from trellis.deploy.serving import link_settings
from trellis.errors import TrellisError
from trellis.wire import certificates
from trellis.wire.nodes import AllowList, Credentials, RefusedError, digest, fingerprint


def test_a_token_lets_its_node_in_and_the_file_does_not_hold_it(tmp_path):
    path = tmp_path / "nodes.yaml"
    token = allowing.admit(path, "a", client=3)
    other = allowing.admit(path, "b")
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    name, entry, _ = AllowList(path).identify(Credentials(token))
    assert (name, entry.client) == ("a", 3)
    assert AllowList(path).identify(Credentials(other))[0] == "b"


@pytest.mark.battery("B6")
@pytest.mark.parametrize("shown", [Credentials(), Credentials("nonsense"), Credentials("sha256:" + "0" * 64)])
def test_others_are_refused(tmp_path, shown):
    path = tmp_path / "nodes.yaml"
    allowing.admit(path, "a")
    with pytest.raises(RefusedError):
        AllowList(path).identify(shown)


@pytest.mark.battery("B6")
def test_a_revoked_or_expired_node_is_shut_out_without_a_restart(tmp_path):
    path = tmp_path / "nodes.yaml"
    token, late = allowing.admit(path, "a"), allowing.admit(path, "b", expires="2026-01-31")
    allow = AllowList(path)
    credential = allow.identify(Credentials(token))[2]
    assert not allow.objection("a", credential, 0)
    allowing.revoke(path, "a")
    allow.refresh()
    assert "revoked" in allow.objection("a", credential, 0)
    with pytest.raises(RefusedError, match="revoked"):
        allow.identify(Credentials(token))
    assert allow.identify(Credentials(late), datetime(2026, 1, 31, 23, tzinfo=UTC))[0] == "b"
    with pytest.raises(RefusedError, match="expired on 2026-01-31"):
        allow.identify(Credentials(late), datetime(2026, 2, 1, tzinfo=UTC))


@pytest.mark.battery("B6")
def test_what_changed_of_a_node_that_is_inside_is_noticed(tmp_path):
    """A token that was replaced, because it leaked, and another client's number end the sessions that they opened."""
    path = tmp_path / "nodes.yaml"
    token = allowing.admit(path, "a")
    allow = AllowList(path)
    credential = allow.identify(Credentials(token))[2]
    assert not allow.objection("a", credential, 2)
    allowing.admit(path, "a")
    allow.refresh()
    assert "replaced" in allow.objection("a", credential, 2)
    fresh = allowing.admit(path, "a", client=1)
    credential = allow.identify(Credentials(fresh))[2]
    assert "client 1" in allow.objection("a", credential, 2)
    assert not allow.objection("a", credential, 1)
    assert allow.reserved("b") == {1}
    assert allow.reserved("a") == set()


@pytest.mark.battery("B6")
def test_an_entry_with_a_token_and_a_certificate_wants_both(tmp_path):
    certificates.write(tmp_path, ["x"], ["a", "b"])
    mine, others = ((tmp_path / f"{name}.pem").read_bytes() for name in ("a", "b"))
    path = tmp_path / "nodes.yaml"
    path.write_text(f"nodes: {{a: {{token: '{digest(b'secret')}', certificate: '{fingerprint(mine)}'}}}}")
    allow = AllowList(path)
    assert allow.identify(Credentials("secret", mine))[0] == "a"
    for shown in (Credentials("secret"), Credentials(None, mine), Credentials("secret", others)):
        with pytest.raises(RefusedError):
            allow.identify(shown)


@pytest.mark.battery("B6")
@pytest.mark.parametrize("damage", [b"nodes: [", b"\xff\xfe", b"nodes: {a: {client: x}}"])
def test_a_damaged_file_shuts_nobody_out_and_is_told_of_once(tmp_path, caplog, damage):
    """What it said before holds; whoever tries to revoke a node in it is told, and a mended one counts again."""
    path = tmp_path / "nodes.yaml"
    token = allowing.admit(path, "a")
    good = path.read_bytes()
    allow = AllowList(path)
    path.write_bytes(damage)
    for _ in range(3):
        assert allow.identify(Credentials(token))[0] == "a"
    assert [record.message for record in caplog.records] == ["allow-list not read; what it said before holds"]
    path.write_bytes(good)
    allowing.revoke(path, "a")
    with pytest.raises(RefusedError, match="revoked"):
        allow.identify(Credentials(token))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes: {a: {token: secret}}", "nodes.a.token"),
        ("nodes: {a: {tokn: x}}", "nodes.a.tokn"),
        ("nodes: {a: {client: 1}, b: {client: 1}}", "client 1 is given to two nodes"),
        ("nodes: {'-x': {}}", "nodes"),
        ("[]", "valid"),
    ],
)
def test_a_wrong_file_is_said_to_be_so(tmp_path, text, said):
    (tmp_path / "nodes.yaml").write_text(text)
    with pytest.raises(TrellisError, match=said) as caught:
        AllowList(tmp_path / "nodes.yaml")
    assert caught.value.code == "nodes-file"


def test_the_command_line_names_the_nearest_node(tmp_path):
    allowing.admit(tmp_path / "nodes.yaml", "hospital-1")
    with pytest.raises(TrellisError, match="Did you mean 'hospital-1'"):
        allowing.revoke(tmp_path / "nodes.yaml", "hospitl-1")
    for name, client, expires in (("-", None, None), ("b", -1, None), ("b", None, "soon")):
        with pytest.raises(TrellisError):
            allowing.admit(tmp_path / "nodes.yaml", name, client, expires)
    assert allowing.admit(tmp_path / "nodes.yaml", "b")


def test_certificates_are_signed_named_and_private(tmp_path):
    certificates.write(tmp_path, ["cloud.example", "10.0.0.1"], ["edge-1"], days=7)
    authority = x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes())
    for name in ("server", "edge-1"):
        made = x509.load_pem_x509_certificate((tmp_path / f"{name}.pem").read_bytes())
        made.verify_directly_issued_by(authority)
        assert stat.S_IMODE((tmp_path / f"{name}.key").stat().st_mode) == 0o600
    server = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["cloud.example"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]
    before = (tmp_path / "ca.pem").read_bytes()
    certificates.write(tmp_path, ["cloud.example"], ["edge-2"])
    assert (tmp_path / "ca.pem").read_bytes() == before
    assert fingerprint((tmp_path / "edge-2.pem").read_bytes()) != fingerprint((tmp_path / "edge-1.pem").read_bytes())
    (tmp_path / "ca.key").unlink()
    with pytest.raises(TrellisError, match=r"ca\.key"):
        certificates.write(tmp_path, ["x"])


@pytest.mark.battery("B6")
def test_a_link_is_closed_unless_told_otherwise(tmp_path):
    certificates.write(tmp_path, ["localhost"])
    allowing.admit(tmp_path / "nodes.yaml", "a")
    pair = {"certificate": tmp_path / "server.pem", "key": tmp_path / "server.key"}
    with pytest.raises(TrellisError) as caught:
        link_settings("127.0.0.1:0")
    assert caught.value.code == "serve-no-tls"
    with pytest.raises(TrellisError) as caught:
        link_settings("127.0.0.1:0", **pair)
    assert caught.value.code == "serve-no-nodes"
    with pytest.raises(TrellisError) as caught:
        link_settings("0.0.0.0:0", insecure=True)
    assert caught.value.code == "serve-insecure"
    assert link_settings("0.0.0.0:0", insecure=True, beyond_loopback=True).credentials is None
    assert link_settings("127.0.0.1:0", nodes=tmp_path / "nodes.yaml", **pair).credentials is not None
    with pytest.raises(TrellisError) as caught:
        link_settings("127.0.0.1:0", nodes=tmp_path / "nodes.yaml", certificate=tmp_path / "gone", key=pair["key"])
    assert caught.value.code == "certs-file"


@pytest.mark.battery("B6")
def test_a_node_sends_its_token_to_nobody_in_the_clear():
    with pytest.raises(TrellisError) as caught:
        Where("cloud.example:7443", token="t", insecure=True).credentials()
    assert caught.value.code == "join-insecure-token"
    assert Where("127.0.0.1:7443", token="t", insecure=True).credentials() is None
    with pytest.raises(TrellisError) as caught:
        Where("cloud.example:7443").credentials()
    assert caught.value.code == "join-no-ca"
    assert "secret" not in repr(Where("a:1", token="secret"))


def test_logs_hold_no_secret():
    record = logging.LogRecord("trellis", 20, __file__, 1, "joined", None, None)
    record.__dict__.update(token="secret", authorization="secret", node="a", run="r")
    for formatter in (logs.Json("node"), logs.Plain()):
        text = formatter.format(record)
        assert "secret" not in text
        assert "a" in text
