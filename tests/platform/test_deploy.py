"""The commands of a deployment: what they write, keep and refuse, and what a server says while it runs."""

from __future__ import annotations

import json
import logging
import shlex
import stat
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from trellis import cli, flower, scenario
from trellis.deploy import allowing, announcing, joining, logs, serving
from trellis.deploy.joining import Where
from trellis.deploy.loopback import is_loopback
from trellis.errors import TrellisError
from trellis.grids.grpc import Settings
from trellis.runs import Run
from trellis.wire import certificates
from trellis.wire.nodes import AllowList, Credentials, fingerprint
from trellis_clients.link.connection import Connection, EndedError, Identity


def trellis(*words: object) -> str:
    """Run a command in this process; return what it printed."""
    result = CliRunner().invoke(cli.app, list(map(str, words)))
    if result.exception is not None:
        raise result.exception
    return result.output


def without(*modules: str) -> list[str]:
    """A command line of trellis in a process where some libraries cannot be imported."""
    code = f"import sys; sys.modules |= dict.fromkeys({list(modules)})\nfrom trellis.cli import main; main()"
    return [sys.executable, "-c", code]


# -- certificates ---------------------------------------------------------------------------------------------------


def test_a_node_more_leaves_the_servers_certificate_as_it_is(tmp_path):
    certs = tmp_path / "certs"
    assert "server (cloud.example)" in trellis("certs", certs, "--host", "cloud.example")
    before = {name: (certs / name).read_bytes() for name in ("ca.pem", "ca.key", "server.pem", "server.key")}
    said = trellis("certs", certs, "--node", "hospital-1")
    assert "hospital-1" in said and "server" not in said.replace(str(certs), "")
    assert {name: (certs / name).read_bytes() for name in before} == before
    assert (certs / "hospital-1.pem").exists()
    assert "kept" in trellis("certs", certs)
    assert {name: (certs / name).read_bytes() for name in before} == before
    trellis("certs", certs, "--host", "other.example")
    assert announcing.names_of(certs / "server.pem") == ["other.example"]
    assert (certs / "ca.pem").read_bytes() == before["ca.pem"]
    # Where there is none, one for this machine is made.
    trellis("certs", tmp_path / "new", "--node", "a")
    assert announcing.names_of(tmp_path / "new" / "server.pem") == ["localhost", "127.0.0.1"]


@pytest.mark.parametrize("name", ["ca", "server", "Server", "../x", "", "a/b", ".hidden"])
def test_a_certificate_has_a_nodes_name(tmp_path, name):
    with pytest.raises(TrellisError) as caught:
        certificates.write(tmp_path / "certs", ["localhost"], ["good", name])
    assert caught.value.code == "certs-name"
    assert not (tmp_path / "certs").exists()


# -- tokens ---------------------------------------------------------------------------------------------------------


def entry(path: Path, node: str) -> dict:
    return yaml.safe_load(path.read_text())["nodes"][node]


def test_a_new_token_keeps_what_the_list_said_of_the_node_but_that_it_was_revoked(tmp_path):
    nodes = tmp_path / "nodes.yaml"
    certificates.write(tmp_path / "certs", nodes=["a"])
    first = allowing.admit(nodes, "a", 3, "2099-12-31", tmp_path / "certs" / "a.pem")
    before = entry(nodes, "a")
    assert before["certificate"] == fingerprint((tmp_path / "certs" / "a.pem").read_bytes())
    allowing.revoke(nodes, "a")
    second = allowing.admit(nodes, "a")
    after = entry(nodes, "a")
    assert first != second and after["token"] != before["token"]
    assert {**after, "token": ""} == {**before, "token": ""} and "revoked" not in after
    assert allowing.admit(nodes, "a", client=0, expires="2098-01-01")
    assert (entry(nodes, "a")["client"], str(entry(nodes, "a")["expires"])) == (0, "2098-01-01")
    assert entry(nodes, "a")["certificate"] == before["certificate"]


def test_a_last_day_that_is_over_is_not_kept_in_silence(tmp_path):
    nodes = tmp_path / "nodes.yaml"
    yesterday = (datetime.now(UTC) - timedelta(days=1)).date().isoformat()
    allowing.admit(nodes, "a", expires=yesterday)
    before = nodes.read_bytes()
    with pytest.raises(TrellisError, match="--expires"):
        allowing.admit(nodes, "a")
    assert nodes.read_bytes() == before
    token = allowing.admit(nodes, "a", expires="2099-01-01")
    assert AllowList(nodes).identify(Credentials(token))[0] == "a"


def test_a_certificate_is_listed_by_the_command(tmp_path):
    trellis("certs", tmp_path / "certs", "--node", "camera-7")
    nodes, pem = tmp_path / "nodes.yaml", tmp_path / "certs" / "camera-7.pem"
    token = trellis("token", "camera-7", "--nodes", nodes, "--client", 1, "--cert", pem).strip()
    name, found, *_ = AllowList(nodes).identify(Credentials(token, pem.read_bytes()))
    assert (name, found.client, found.certificate) == ("camera-7", 1, fingerprint(pem.read_bytes()))
    (tmp_path / "x.pem").write_text("no certificate")
    for wrong in (tmp_path / "x.pem", tmp_path / "gone.pem"):
        with pytest.raises(TrellisError) as caught:
            trellis("token", "camera-8", "--nodes", nodes, "--cert", wrong)
        assert caught.value.code == "certs-file"


def test_a_token_goes_to_a_file_that_nobody_else_can_read(tmp_path):
    nodes, to = tmp_path / "nodes.yaml", tmp_path / "a.token"
    to.write_text("old, and open to all")
    to.chmod(0o644)
    said = trellis("token", "a", "--nodes", nodes, "--to", to)
    assert stat.S_IMODE(to.stat().st_mode) == 0o600
    token = joining.token(to)
    assert token and token not in said
    assert AllowList(nodes).identify(Credentials(token))[0] == "a"
    # Where the file cannot be, the list stays as it was: the old token still counts.
    with pytest.raises(TrellisError) as caught:
        trellis("token", "a", "--nodes", nodes, "--to", tmp_path / "nowhere" / "a.token")
    assert caught.value.code == "token-file"
    assert AllowList(nodes).identify(Credentials(token))[0] == "a"
    with pytest.raises(TrellisError):
        trellis("token", "no/name", "--nodes", nodes, "--to", to)
    assert joining.token(to) == token and {each.name for each in tmp_path.iterdir()} == {"nodes.yaml", "a.token"}


@pytest.mark.parametrize("held", [None, b"", b"\n", b"two words", b"\xff\xfe"])
def test_a_token_file_that_is_none_is_one_line(tmp_path, held):
    if held is not None:
        (tmp_path / "token").write_bytes(held)
    with pytest.raises(TrellisError) as caught:
        trellis("join", "localhost:1", "--insecure", "--token-file", tmp_path / "token", "--state", tmp_path / "state")
    assert caught.value.code == "token-file"


def test_a_nodes_folder_is_its_own(tmp_path):
    made = joining.private(tmp_path / "nodes" / "a")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    made.chmod(0o770)  # an operator's own choice, or a volume's
    assert stat.S_IMODE(joining.private(made).stat().st_mode) == 0o770
    (tmp_path / "file").touch()
    with pytest.raises(TrellisError) as caught:
        joining.private(tmp_path / "file" / "a")
    assert caught.value.code == "node-store"


# -- what is not installed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "gone", "extras"),
    [
        ("join localhost:1 --insecure --edge", ["grpc"], "[edge]"),
        ("join localhost:1 --insecure --edge", ["onnxruntime"], "[edge]"),
        ("join localhost:1 --insecure", ["torch", "flwr", "ray"], "[train,deploy]"),
        ("join localhost:1 --insecure", ["grpc"], "[train,deploy]"),
        ("serve x.yaml --insecure", ["grpc"], "[train,deploy]"),
        ("serve x.yaml --insecure", ["torch", "flwr", "ray"], "[train,deploy]"),
        ("certs certs", ["cryptography"], "[train,deploy]"),
    ],
)
def test_a_library_that_is_missing_is_one_line(tmp_path, command, gone, extras):
    done = subprocess.run(
        [*without(*gone), *shlex.split(command)], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith("[app-missing]") and f"pip install '.{extras}'" in line
    assert ("--edge" in line) == (extras == "[train,deploy]" and command.startswith("join"))


# -- plain text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True), ("127.8.9.1:1", True), ("localhost:1", True), ("LOCALHOST:1", True), ("[::1]:1", True),
        ("unix:/run/x", True), ("127.0.0.1.example.org:1", False), ("localhost.example.org:1", False),
        ("cloud.example:1", False), ("10.0.0.1:1", False), ("0.0.0.0:1", False), ("[::]:1", False), (":1", False),
        ("127.1.example:1", False), ("[2001:db8::1]:1", False),
    ],
)  # fmt: skip
@pytest.mark.battery("B6")
def test_plain_text_stays_on_this_machine_unless_forced(address, local):
    assert is_loopback(address) == local
    if local:
        assert Where(address, insecure=True).credentials() is None
        assert serving.link_settings(address, insecure=True).credentials is None
        return
    with pytest.raises(TrellisError) as caught:
        Where(address, insecure=True).credentials()
    assert caught.value.code == "join-insecure"
    with pytest.raises(TrellisError) as caught:
        serving.link_settings(address, insecure=True)
    assert caught.value.code == "serve-insecure"
    assert Where(address, insecure=True, beyond_loopback=True).credentials() is None
    assert serving.link_settings(address, insecure=True, beyond_loopback=True).credentials is None
    with pytest.raises(TrellisError) as caught:  # a token stays here even so
        Where(address, insecure=True, beyond_loopback=True, token="t").credentials()
    assert caught.value.code == "join-insecure-token"


# -- what a server says ---------------------------------------------------------------------------------------------


def test_the_hint_names_a_server_that_can_be_called_and_what_it_asks_for(tmp_path):
    certificates.write(tmp_path, ["localhost", "cloud.example", "10.0.0.1"])
    names, said = announcing.names_of(tmp_path / "server.pem"), []
    assert names == ["localhost", "cloud.example", "10.0.0.1"]
    announcing.Spoken("0.0.0.0:7443", announcing.join_options(True, True, False), names, said.append).listening(7443)
    announcing.Spoken("127.0.0.1:0", announcing.join_options(False, False, False), [], said.append).listening(81)
    assert said[0].endswith("trellis join cloud.example:7443 --ca ca.pem --token-file TOKEN")
    assert said[1].endswith("trellis join 127.0.0.1:81 --insecure")
    assert announcing.join_options(True, True, True) == "--ca ca.pem --cert NODE.pem --token-file TOKEN"
    command = cli.typer.main.get_command(cli.app).commands["join"]
    for line in said:  # the command line takes it
        command.make_context("join", shlex.split(line.partition("trellis join ")[2]))
    nobody = announcing.Spoken("0.0.0.0:1", "", [], said.append)
    nobody.listening(1)
    assert "join 0.0.0.0" not in said[-1]


class Told:
    """An announcer that remembers."""

    def __init__(self):
        self.ports, self.there, self.notes = [], [], []

    def listening(self, port):
        self.ports.append(port)

    def waiting(self, there, needed):
        self.there.append((there, needed))

    def note(self, text):
        self.notes.append(text)


@contextmanager
def offered(cells, **settings):
    """The grids of a server whose cells are as given, and what it said."""
    told = Told()
    options = serving.Options(Settings("127.0.0.1:0", **settings), clients=2)
    offer = serving.grids(options, "run", told.listening, announcer=told)
    with offer(SimpleNamespace(Sites=lambda _: None), cells) as grid_for:
        yield told, grid_for


def node(port: int, name: str) -> Connection:
    return Connection(Identity(f"127.0.0.1:{port}", name, name, give_up_after_s=30))


def until(holds, seconds=20.0):
    waited = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if holds():
            return
        waited.wait(0.02)
    raise AssertionError("it did not happen in time")


def test_a_server_says_for_how_many_clients_it_waits():
    cell = SimpleNamespace(parts=[[0], [1]], scenario={"checkpoint": {"every": 1}})
    with ExitStack() as stack, offered({"main-seed0": cell}) as (told, _):
        until(lambda: told.there == [(0, 2)])
        for number in (1, 2):
            here = node(told.ports[0], f"node-{number}")
            stack.callback(here.close)
            here.start()
            until(lambda number=number: told.there[-1] == (number, 2))
    assert told.there == [(0, 2), (1, 2), (2, 2)]
    said = []
    spoken = announcing.Spoken("127.0.0.1:1", "", [], said.append)
    for there, needed in told.there:
        spoken.waiting(there, needed)
    assert said[1] == "waiting: 1 of 2 clients are there"


@pytest.mark.parametrize("nodes", [2, 1])
def test_nodes_of_a_run_that_is_complete_are_told_so(nodes):
    """Both come, and the server ends at once; one comes, and it ends when the time is over."""
    ends: list[str] = []

    def work(port, number):
        here = node(port, f"node-{number}")
        try:
            here.start()
            list(here.tasks())
        except EndedError as end:
            ends.append(str(end))

    threads = []

    def listening(port):
        for number in range(nodes):
            threads.append(threading.Thread(target=work, args=(port, number), daemon=True))
            threads[-1].start()

    options = serving.Options(Settings("127.0.0.1:0", leave_after_s=60.0 if nodes == 2 else 3.0), clients=2)
    with serving.grids(options, "run", listening)(SimpleNamespace(), {}):
        pass
    for thread in threads:
        thread.join(20)
    assert ends == ["the run is over"] * nodes


def test_every_round_of_a_run_is_logged_once_whatever_a_person_is_shown(tmp_path, caplog, capsys):
    """The command line's own way, with clients in this process; `make images-check` has real ones."""
    flower.quiet()
    text = "name: d\ndata: digits\nclients: 2\nmodel: linear\nrounds: {count: 2}\nruntime: {grid: local}\n"
    (tmp_path / "d.yaml").write_text(text)
    current = Run.create(tmp_path / "runs", scenario.load(tmp_path / "d.yaml"))
    announcer = announcing.Logged("d/1")
    with caplog.at_level(logging.INFO, "trellis.server"):
        assert cli.execute(current, quiet=False, as_json=True, on_round=announcer.round) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["round"] for line in shown if "round" in line] == [0, 1, 2]
    kept = [record for record in caplog.records if record.name == "trellis.server"]
    said = [json.loads(logs.Json("server").format(record)) for record in kept]
    assert [(line["event"], line["cell"], line["round"]) for line in said] == [
        ("round", "main-seed0", number) for number in (0, 1, 2)
    ]
    assert "central-accuracy" in said[-1]["figures"] and said[-1]["replies"] == 2


def test_a_round_is_a_line_of_the_log(caplog):
    line = {
        "round": 3, "seconds": 1.2499999, "cohort": 2, "replies": 1, "bytes_down": 10, "bytes_up": 20,
        "failures": [{"client": 1, "phase": "train", "reason": "late"}],
        "train": {"loss": 0.5}, "central": {"accuracy": 0.75}, "federated": None,
    }  # fmt: skip
    with caplog.at_level(logging.INFO, "trellis.server"):
        announcing.Logged("fleet/1").round("main-seed0", line)
    said = json.loads(logs.Json("server").format(caplog.records[-1]))
    del said["time"]
    assert said == {
        "level": "info", "role": "server", "event": "round", "run": "fleet/1", "cell": "main-seed0", "round": 3,
        "seconds": 1.25, "cohort": 2, "replies": 1, "failed": 1, "bytes_down": 10, "bytes_up": 20,
        "figures": {"train-loss": 0.5, "central-accuracy": 0.75},
    }  # fmt: skip
