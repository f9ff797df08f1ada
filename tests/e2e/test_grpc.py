"""The same scenario over gRPC: the same bits as in simulation, whatever happens to the nodes on the way."""

from __future__ import annotations

import pytest

from deployment import SCENARIO, nodes, serve
from federations import lines
from trellis import experiment
from trellis.deploy import allowing
from trellis.deploy.joining import Where, node_config
from trellis.deploy.serving import link_settings
from trellis.errors import TrellisError
from trellis.grids.grpc import Settings
from trellis.wire import certificates
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.nodes import digest
from trellis_clients.link.consent import Consent

FOUR = range(4)


def test_four_nodes_give_the_bits_of_the_simulation(tmp_path, simulated):
    with nodes(tmp_path) as fleet:
        run, outcome = serve(tmp_path, lambda port: [fleet.start(port, client) for client in FOUR])
    assert not outcome.failed
    assert outcome.summaries[0]["sha256"] == simulated
    assert set(fleet.ends.values()) == {"the run is over"}
    assert {row["client"] for row in lines(run, "clients.jsonl")} == set(FOUR)


def test_compressed_payloads_change_no_bit(tmp_path, simulated):
    with nodes(tmp_path) as fleet:
        _, outcome = serve(
            tmp_path,
            lambda port: [fleet.start(port, client, encoding=pb.ENCODING_ZSTD) for client in FOUR],
            compression="zstd",
        )
    assert outcome.summaries[0]["sha256"] == simulated


def test_variants_and_seeds_go_over_one_link(tmp_path):
    overrides = ("seeds=[0, 1]", "rounds.count=1", "variants={a: {}, b: {trainer: {lr: 0.05}}}")
    with nodes(tmp_path) as fleet:
        _, outcome = serve(tmp_path, lambda port: [fleet.start(port, client) for client in FOUR], overrides=overrides)
    assert not outcome.failed
    assert len({each["sha256"] for each in outcome.summaries}) == 4


def test_nodes_without_a_wish_are_dealt_the_clients(tmp_path, simulated):
    with nodes(tmp_path) as fleet:
        _, outcome = serve(tmp_path, lambda port: [fleet.start(port, None, f"n{i}") for i in FOUR])
    assert outcome.summaries[0]["sha256"] == simulated


def test_shortened_updates_learn_and_say_what_they_lost(tmp_path):
    with nodes(tmp_path) as fleet:
        run, outcome = serve(
            tmp_path,
            lambda port: [fleet.start(port, client) for client in FOUR],
            overrides=("trainer=sgd", "strategy=fedavg"),
            updates="int8",
        )
    assert not outcome.failed
    rows = [row for row in lines(run, "clients.jsonl") if row["phase"] == "train"]
    assert all(0 < row["metrics"]["shortening-error"] < 0.05 for row in rows)
    first, last = lines(run)[0], lines(run)[-1]
    assert last["central"]["accuracy"] > first["central"]["accuracy"]


def test_a_node_that_comes_back_finds_its_private_state(tmp_path, simulated):
    """A node is stopped after round 1 and started anew on the same folder; another loses its connection only."""
    with nodes(tmp_path) as fleet:

        def after(_, line):
            if line["round"] == 1:
                node, thread = fleet.running["node-2"]
                node.connection._channel.close()  # as if the machine had gone: no word of farewell
                node.connection._stopped.set()
                node.connection.agenda.finish()
                node.finish()
                thread.join(20)
                fleet.start(fleet.port, 2)

        _, outcome = serve(tmp_path, fleet.start_all, hooks=experiment.Hooks(on_round=after))
    assert not outcome.failed
    assert outcome.summaries[0]["sha256"] == simulated


MINE = """\
from trellis.registry import register
from trellis_clients.trainer import Trainer


@register("trainers", "mine", summary="s", paper="p", takes=("image",), sends="weights")
class Mine(Trainer):
    pass
"""


@pytest.mark.battery("B11")
@pytest.mark.parametrize("consent", ["none", "of another file", "given"])
def test_code_from_a_file_runs_only_with_the_operators_consent(tmp_path, consent):
    """The server names a file; the node runs its operator's copy, if its digest is on the operator's list."""
    (tmp_path / "mine.py").write_text(MINE)
    mine = tmp_path / "operators"
    mine.mkdir()
    (mine / "mine.py").write_text(MINE if consent == "given" else MINE + "\nprint('other')\n")
    allowed = [digest(MINE.encode())] if consent != "none" else []
    text = SCENARIO.replace("{name: scaffold, lr: 0.1}", '"mine.py:Mine"').replace("strategy: scaffold", "")
    with nodes(tmp_path) as fleet:
        _, outcome = serve(
            tmp_path,
            lambda port: [fleet.start(port, c, changed=Consent(allowed, mine)) for c in FOUR],
            text=text,
            overrides=("rounds.count=1",),
        )
    if consent == "given":
        assert not outcome.failed
    else:
        reason = str(next(iter(outcome.failed.values())))
        assert "mine.py" in reason
        assert "code-not-allowed" in reason


@pytest.mark.battery("F11")
def test_without_any_node_the_run_stops_with_a_reason(tmp_path):
    settings = Settings(beat_s=0.5, leave_after_s=0.5, give_up_after_s=1.0)
    _, outcome = serve(tmp_path, lambda _: None, settings=settings)
    error = next(iter(outcome.failed.values()))
    assert error.code == "no-clients"
    assert "0 of 4 clients" in str(error)


def test_a_node_changes_its_own_data_only():
    config = node_config("client=3 data.path=/mine.npz runtime.device=cpu")
    assert (config.client, config.overrides) == (3, ("data.path=/mine.npz", "runtime.device=cpu"))
    for wrong in ("trainer.lr=1", "client=x", "client"):
        with pytest.raises(TrellisError):
            node_config(wrong)


# -- who gets in ----------------------------------------------------------------------------------------


@pytest.fixture
def closed(tmp_path):
    """Certificates, an allow-list with a token for each client, and the settings of a server that uses them."""
    certificates.write(tmp_path / "certs", ["127.0.0.1"], ["stranger"])
    tokens = [allowing.admit(tmp_path / "nodes.yaml", f"node-{client}", client) for client in FOUR]
    made = certificates.pair(tmp_path / "certs", "server")
    settings = link_settings(
        "127.0.0.1:0",
        certificate=made.certificate,
        key=made.key,
        nodes=tmp_path / "nodes.yaml",
        beat_s=0.5,
        leave_after_s=5.0,
        give_up_after_s=60.0,
    )
    return settings, tokens, Where("127.0.0.1:0", ca=tmp_path / "certs" / "ca.pem").credentials()


def test_with_tls_and_tokens_it_is_the_same_run(tmp_path, simulated, closed):
    settings, tokens, tls = closed
    with nodes(tmp_path) as fleet:

        def listening(port):
            for client, token in enumerate(tokens):
                fleet.start(port, None, f"node-{client}", token=token, channel_credentials=tls)

        _, outcome = serve(tmp_path, listening, settings=settings)
    assert not outcome.failed
    assert outcome.summaries[0]["sha256"] == simulated


@pytest.mark.battery("B6")
def test_strangers_are_refused_and_the_run_goes_on(tmp_path, simulated, closed):
    settings, tokens, tls = closed
    other = tmp_path / "other"
    certificates.write(other, ["127.0.0.1"])
    elsewhere = Where("x:1", ca=other / "ca.pem").credentials()
    with nodes(tmp_path) as fleet:

        def listening(port):
            fleet.start(port, None, "nobody", channel_credentials=tls)
            fleet.start(port, None, "guess", token="guess", channel_credentials=tls)
            fleet.start(port, 3, "node-2", token=tokens[2], channel_credentials=tls)  # it is client 2
            fleet.start(port, None, "node-9", token=tokens[0], channel_credentials=tls)  # it is node-0
            fleet.start(port, None, "plain", token=tokens[0], give_up_after_s=0.5)
            fleet.start(port, None, "astray", token=tokens[0], channel_credentials=elsewhere, give_up_after_s=0.5)
            for client, token in enumerate(tokens):
                fleet.start(port, None, f"good-{client}", token=token, channel_credentials=tls, node=f"node-{client}")

        _, outcome = serve(tmp_path, listening, settings=settings)
        for _, thread in fleet.running.values():
            thread.join(60)
    assert outcome.summaries[0]["sha256"] == simulated
    for name, code in (
        ("nobody", "link-refused"),
        ("guess", "link-refused"),
        ("node-2", "link-refused"),
        ("node-9", "link-refused"),
        ("plain", "link-lost"),
        ("astray", "link-lost"),
    ):
        assert getattr(fleet.ends[name], "code", fleet.ends[name]) == code, name
        assert not any(token in str(fleet.ends[name]) for token in tokens)


@pytest.mark.battery("B6")
def test_a_node_that_is_revoked_in_the_middle_of_a_run_is_out(tmp_path, closed):
    settings, tokens, tls = closed
    with nodes(tmp_path) as fleet:

        def listening(port):
            for client, token in enumerate(tokens):
                fleet.start(port, None, f"node-{client}", token=token, channel_credentials=tls)

        def after(_, line):
            if line["round"] == 1:
                allowing.revoke(tmp_path / "nodes.yaml", "node-1")
                fleet.running["node-1"][1].join(20)

        overrides = ("rounds.quorum=0.5", "rounds.count=2")
        run, outcome = serve(
            tmp_path,
            listening,
            overrides=overrides,
            settings=settings,
            hooks=experiment.Hooks(on_round=after),
            min_clients=3,
        )
    assert not outcome.failed
    assert fleet.ends["node-1"].code == "link-refused"
    assert "revoked" in str(fleet.ends["node-1"])
    second = {
        row["client"]: row for row in lines(run, "clients.jsonl") if row["round"] == 2 and row["phase"] == "train"
    }
    assert sorted(client for client, row in second.items() if row["ok"]) == [0, 2, 3]
    assert second[1]["reason"] == "no node is this client"
