"""CEMA over gRPC: devices without torch answer outside clients while the cloud adapts them, and outlive what fails."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from deployment import carry_on, serve
from edge_fleet import Member, ask, batch, members, stream, trained
from federations import lines, run, write
from trellis import experiment, flower, records, scenario
from trellis.errors import DataError, TrellisError
from trellis.grids.grpc import GrpcGrid, Settings
from trellis.runs import Run
from trellis.wire.generated import link_pb2 as pb
from trellis_clients.edge import loading, state
from trellis_clients.edge.runtime import Runtime
from trellis_clients.link import edge_duty
from trellis_clients.link.connection import Identity
from trellis_clients.link.edge_device import Device, Serving
from trellis_clients.link.edge_node import EdgeNode
from trellis_clients.link.store import Store, instance_of

ROUNDS, BATCHES = 12, 2
SCENARIO = f"""\
name: deployed-cema
data: {{name: digits, size: 16}}
clients: 2
partition: {{name: iid, test_fraction: 0.5}}
model: {{name: small-cnn, width: 8, hidden: 32, norm: batch}}
trainer:
  name: cema
  statistics: source         # what adapts is the cloud alone: batch statistics would do most of it here
  stream: {{corruptions: [brightness], severity: 3.0, rotate: false, batch_size: 32}}
strategy:
  name: cema
  statistics: source
  device_model: export
  batches: {BATCHES}
  epochs: 8
  edge_lr: 0.01
  foundation: {{name: small-cnn, width: 16, norm: batch}}
rounds: {{count: {ROUNDS}, deadline_s: 60}}
evaluation: {{central_every: 0, federated_every: 0}}
probe: {{every: 0, least: 0}}
runtime: {{grid: local}}
"""


class OutsideClient:
    """Asks one device with its share of the corrupted digits, K batches a round, and knows which answers are right."""

    def __init__(self, member: Member, each: scenario.Scenario) -> None:
        self.member, self.source = member, stream(each, member.client)
        self.round, self.answers, self.labels, self.error = 0, [], [], None
        self.turn = threading.Condition()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def finished(self, number: int) -> None:
        with self.turn:
            self.round = number
            self.turn.notify_all()

    def _run(self) -> None:
        try:
            with triton.InferenceServerClient(self.member.where()) as device:
                for position in range(ROUNDS * BATCHES):
                    if position % BATCHES == 0:
                        self._wait_for(position // BATCHES)
                    pixels, labels = batch(self.source, position)
                    self.answers.append(ask(device, pixels))
                    self.labels.append(labels)
        except Exception as error:
            self.error = error

    def _wait_for(self, number: int) -> None:
        """Until the round before is over and its parameters are with the device."""
        with self.turn:
            assert self.turn.wait_for(lambda: self.round >= number, 120)
        end = time.monotonic() + 30
        while self.member.version() < number:
            assert time.monotonic() < end, "the device took in no new parameters"
            time.sleep(0.02)


def accuracy(answers, labels) -> float:
    """Of the later half of a stream."""
    half = len(answers) // 2
    return float(np.mean(np.concatenate(answers[half:]) == np.concatenate(labels[half:])))


def test_two_devices_without_torch_are_adapted_while_they_answer(tmp_path):
    """Accuracy is the outside clients' to know: above the same model unadapted, and what it is in simulation."""
    (tmp_path / "simulated").mkdir()
    simulated, _ = run(tmp_path / "simulated", text=SCENARIO.replace("  device_model: export\n", ""))
    each = scenario.load(write(tmp_path, SCENARIO))
    clients: list[OutsideClient] = []
    with members() as fleet:

        def listening(port):
            for client in (0, 1):
                fleet.append(Member(port, client, tmp_path / f"device-{client}"))
                clients.append(OutsideClient(fleet[-1], each))

        def after(_, line):
            for client in clients:
                client.finished(line["round"])

        current, outcome = serve(tmp_path, listening, text=SCENARIO, hooks=experiment.Hooks(on_round=after))
        assert not outcome.failed, (outcome.failed, *["".join(member.log) for member in fleet])
        for client in clients:
            client.thread.join(60)
            assert client.error is None and len(client.answers) == ROUNDS * BATCHES
        (model,) = (tmp_path / "device-0").glob("*/*/device/model.onnx")
        for client, member in zip(clients, fleet, strict=True):
            plain = Runtime(loading.load(model, "model"))
            prepared = plain.live.model.preprocessing
            shown = [batch(client.source, position)[0] for position in range(ROUNDS * BATCHES)]
            unadapted = [
                plain.predict(prepared.to_inputs(pixels / np.float32(255))).logits.argmax(1) for pixels in shown
            ]
            adapted, before = accuracy(client.answers, client.labels), accuracy(unadapted, client.labels)
            there = [row["metrics"] for row in lines(simulated, "clients.jsonl") if row["client"] == member.client]
            as_simulated = np.mean([metrics["accuracy"] for metrics in there[ROUNDS // 2 :]])
            assert adapted > before + 0.1, (adapted, before)
            assert abs(adapted - as_simulated) < 0.04, (adapted, as_simulated)
            assert "libtorch" not in member.maps() and "onnxruntime" in member.maps()
        # The device answers though the run is over, and ends when it is told to.
        with triton.InferenceServerClient(fleet[0].where()) as device:
            assert np.mean(ask(device, shown[0]) == clients[1].labels[0]) > 0.5
        assert [member.end() for member in fleet] == [0, 0]
        assert {member.last for member in fleet} == {"the run is over"}
    rows = [row for row in lines(current, "clients.jsonl") if row["phase"] == "train"]
    assert all(row["ok"] and "accuracy" not in row["metrics"] for row in rows)
    assert sum(row["metrics"]["seen"] for row in rows) == 2 * 32 * ROUNDS * BATCHES
    for line in lines(current)[1:]:
        assert "accuracy" not in line["train"] and "right" not in line["train"]
        assert 0 < line["train"]["upload-share"] < 1
    simulated_uploads = sum(line["train"]["uploaded"] for line in lines(simulated)[1:])
    uploads = sum(line["train"]["uploaded"] for line in lines(current)[1:])
    assert abs(uploads - simulated_uploads) < 0.15 * simulated_uploads


# -- restarts ---------------------------------------------------------------------------------------------

SMALL = (
    SCENARIO.replace("device_model: export", "device_model: source.onnx\n  source_weights: source.safetensors")
    .replace("statistics: source         #", "filter: false  #")  # every sample goes up, as far as it may
    .replace("epochs: 8", "epochs: 1")
    .replace(f"count: {ROUNDS}", "count: 6")
)


class Load(threading.Thread):
    """Asks a device without pause, until it is stopped; counts what went wrong."""

    def __init__(self, member: Member, pixels, name: str) -> None:
        super().__init__(daemon=True)
        self.member, self.pixels, self.name_ = member, pixels, name
        self.answered, self.errors, self.stopped = 0, [], threading.Event()
        self.start()

    def run(self) -> None:
        with triton.InferenceServerClient(self.member.where()) as device:
            while not self.stopped.wait(0.02):
                try:
                    ask(device, self.pixels, self.name_)
                    self.answered += 1
                except Exception as error:
                    self.errors.append(str(error))

    def stop(self) -> None:
        self.stopped.set()
        self.join(30)


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder with a trained source model, as weights and exported."""
    folder = tmp_path_factory.mktemp("source")
    trained(scenario.load(write(folder, SCENARIO)), folder)
    return folder


def test_a_device_and_the_server_are_started_again(tmp_path, source):
    """A device that has its model over the link is killed in a task; then the server goes away, and comes back."""
    for name in ("source.onnx", "source.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    pixels, _ = batch(stream(scenario.load(write(tmp_path, SMALL)), 0), 0)
    ports: list[int] = []
    loads: dict[int, Load] = {}
    killed: list[int] = []
    with members() as fleet:

        def listening(port):
            ports.append(port)
            if not fleet:
                fleet.append(Member(port, 0, tmp_path / "device-0"))
                fleet.append(Member(port, 1, tmp_path / "device-1", "--model", str(tmp_path / "source.onnx")))
                threading.Thread(target=ask_all, daemon=True).start()

        def ask_all():
            for member, name in zip(fleet, ("model", "source"), strict=True):
                member.where()
                loads[member.client] = Load(member, pixels, name)

        def after(_, line):
            if line["round"] == 2:
                loads[0].stop()  # so that its next task waits, or the one after, if enough was answered already
                killer.start()
            if line["round"] == 4:
                raise StoppedError

        def kill():
            while fleet[0].version() not in killed:
                killed[:] = [fleet[0].version()]
                time.sleep(1.0)
            fleet[0].end(signal.SIGKILL)  # in the middle of a task: the round has stood still for a second
            fleet[0] = Member(ports[0], 0, tmp_path / "device-0", "--serve", fleet[0].line["address"])
            fleet[0].where()
            killed.append(fleet[0].line["affine_version"])
            loads[0] = Load(fleet[0], pixels, "model")

        killer = threading.Thread(target=kill, daemon=True)
        with pytest.raises(StoppedError):
            serve(tmp_path, listening, text=SMALL, hooks=experiment.Hooks(on_round=after))
        killer.join(30)
        then, now = killed
        assert 1 <= then - 1 <= now <= then  # its own parameters, at least those of the last report
        (path,) = (tmp_path / "runs").glob("*/*/")
        answered = loads[1].answered
        time.sleep(1.0)
        # Without a server: a device is started anew and serves, the others never stopped.
        loads[0].stop()
        assert fleet[0].end() == 0
        fleet[0] = Member(ports[0], 0, tmp_path / "device-0")
        fleet[0].where()
        loads[0] = Load(fleet[0], pixels, "model")
        time.sleep(0.5)
        assert loads[1].answered > answered + 5
        current = Run.open(path)
        settings = Settings(address=f"127.0.0.1:{ports[0]}", beat_s=0.5, leave_after_s=20, give_up_after_s=60)
        outcome = carry_on(current, listening, settings=settings)
        assert not outcome.failed, (outcome.failed, *["".join(member.log) for member in fleet])
        for load in loads.values():
            load.stop()
        assert loads[0].errors == [] and loads[1].errors == []
        assert [member.end() for member in fleet] == [0, 0]
    assert [line["round"] for line in lines(current)] == list(range(7))
    rows = [row for row in lines(current, "clients.jsonl") if row["phase"] == "train"]
    assert all(row["ok"] for row in rows)
    for client in (0, 1):
        seen = [row["metrics"]["seen"] for row in rows if row["client"] == client]
        assert min(seen) >= 32 * BATCHES
        (kept,) = (tmp_path / f"device-{client}").glob("*/*/device/state.npz")
        values, _ = state.read(kept)
        assert sum(seen) <= values["selection"]["seen"]  # nothing is reported twice
        versions = [row["metrics"]["affine-version"] for row in rows if row["client"] == client]
        assert versions == sorted(versions) and versions[-1] >= 4
    assert sum(row["metrics"]["seen"] for row in rows if row["client"] == 1) <= 32 * loads[1].answered


# -- one device, one message at a time --------------------------------------------------------------------


@pytest.fixture
def link(tmp_path, source):
    """A grid with one device that serves in a thread, and what sends it a message of the given records."""
    flower.quiet()
    text = SCENARIO.replace("  statistics: source  ", "  filter: false\n  statistics: source  ")  # all goes up that may
    each = scenario.plain(scenario.load(write(tmp_path, text)))
    assert each["trainer"]["filter"] is False
    made = []

    def anew(port=0):
        send.grid = GrpcGrid(1, Settings(f"127.0.0.1:{port}", beat_s=0.5, leave_after_s=20))
        send.grid.describe("main-seed0", each, 0)
        send.round = 1

    def start(model: Path | None = source / "source.onnx"):
        identity = Identity(
            f"127.0.0.1:{send.grid.link.port}", "device", instance_of(tmp_path / "device"), kind=pb.NODE_KIND_EDGE
        )
        node = EdgeNode(identity, tmp_path / "device", Serving(address="127.0.0.1:0"), model)
        thread = threading.Thread(target=node.run, daemon=True)
        thread.start()
        made.append((node, thread))
        return node

    def send(kind="train.stream", timeout=10.0, **content):
        digest = {"source-sha256": content.pop("digest")} if "digest" in content else {}
        config = ConfigRecord({"batches": 1, "server-round": send.round, **digest})
        send.round += 1
        list(send.grid.get_node_ids())  # waits until it has joined
        (reply,) = send.grid.stream(
            [Message(RecordDict({"config": config, **content}), flower.node_of(0), kind)], timeout=timeout
        )
        return reply

    send.anew = anew
    anew()
    yield start, send
    for node, thread in made:
        node.stop()
        thread.join(20)
    send.grid.close()


def arrays_of(source: Path, change: float = 0.0) -> ArrayRecord:
    predictor = loading.load(source / "source.onnx", "m").predictor
    return records.array_record({name: values + np.float32(change) for name, values in predictor.affine().items()})


def answering(node: EdgeNode, batches: int, seconds: float = 20.0, after: Device | None = None) -> threading.Thread:
    """Give a device something to answer once it serves, ``after`` another one."""

    def work():
        end = time.monotonic() + seconds
        while node.device in (None, after) and time.monotonic() < end:
            time.sleep(0.02)
        runtime = node.device.runtime
        for seed in range(batches):
            x = np.random.default_rng(seed).random((16, *runtime.live.expected.shape), dtype=np.float32)
            with runtime.turnstile.ticket():
                runtime.predict(x)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_task_takes_in_parameters_and_reports_what_was_answered(link, source):
    start, send = link
    node = start()
    answering(node, 3)
    reply = send(arrays=arrays_of(source, 0.125))
    assert not reply.has_error(), reply.error
    metrics = reply.content["metrics"]
    assert metrics["seen"] == metrics["num-examples"] in (32, 48)
    assert metrics["affine-version"] == 1 and "right" not in metrics and "accuracy" not in metrics
    images = records.view(reply.content["uploads"]["images"])
    assert images.dtype == np.uint8 and images.shape == (metrics["uploaded"], 1, 16, 16)
    given = arrays_of(source, 0.125)
    for name, values in node.device.runtime.live.model.predictor.affine().items():
        np.testing.assert_array_equal(values, records.view(given[name]))
    # The rest counts for the next task, and the same parameters are no reason to begin anew.
    answering(node, 3).join(20)
    again = send(arrays=given)
    assert metrics["seen"] + again.content["metrics"]["seen"] == 96
    assert again.content["metrics"]["affine-version"] == 1


def test_a_server_that_lost_an_answer_is_given_it_again(link, source, tmp_path):
    """A device that was started again, and a server that went back: the same bytes, though nobody asked the device."""
    start, send = link
    node = start()
    answering(node, 3)
    first = send(arrays=arrays_of(source, 0.125))
    until(lambda: not node.device.store.unsettled())  # the server's word is noted; what that loses is tested elsewhere
    node.stop()
    until(lambda: not any(thread.name == "housekeeping" for thread in threading.enumerate()))
    port = send.grid.link.port
    send.grid.link.close("the server stopped", final=False)
    node = start()
    until(lambda: node.device is not None)  # without a server
    assert node.device.runtime.live.affine_version == 1
    assert node.device.known.seen == first.content["metrics"]["seen"]
    waiting = len(node.device.uploads)
    send.anew(port)
    again = send(arrays=arrays_of(source, 0.125))
    assert again.content["metrics"] == first.content["metrics"]
    assert records.digest(again.content["uploads"]) == records.digest(first.content["uploads"])
    assert first.content["metrics"]["uploaded"] == 32
    assert len(node.device.uploads) == waiting


def test_a_verdict_that_was_not_noted_is_asked_for_again(link, source, tmp_path, monkeypatch):
    """As if the device had been killed between the server's word and its own note: nothing is reported twice."""
    start, send = link
    node = start()
    answering(node, 3)
    monkeypatch.setattr(Store, "accepted", lambda *_: None)
    monkeypatch.setattr(Device, "delivered", lambda *_: None)
    first = send(arrays=arrays_of(source, 0.125)).content["metrics"]
    node.stop()
    until(lambda: not any(thread.name == "housekeeping" for thread in threading.enumerate()))
    monkeypatch.undo()
    node = start()
    answering(node, 2)
    until(lambda: node.device is not None)
    assert node.device.known.seen == 0 and len(node.device.uploads) >= first["uploaded"] > 0
    second = send(arrays=arrays_of(source)).content["metrics"]
    assert first["seen"] + second["seen"] <= 16 * 5
    until(lambda: node.device.known.seen == first["seen"] + second["seen"])


def test_time_that_runs_out_ends_the_wait(link, source):
    start, send = link
    node = start()
    idle = send(arrays=arrays_of(source), timeout=2.0)
    assert "edge-idle" in idle.error.reason
    answering(node, 1).join(20)
    reply = send(arrays=arrays_of(source), timeout=2.0)
    assert reply.content["metrics"]["seen"] == 16


def test_what_a_device_cannot_do_is_said_and_it_goes_on(link, source):
    start, send = link
    node = start()
    assert "edge-task" in send("train", arrays=arrays_of(source)).error.reason
    assert "edge-task" in send("query.partition").error.reason
    assert "edge-task" in send().error.reason
    some = dict(list(arrays_of(source).items())[:-1])
    assert "affine-missing" in send(arrays=ArrayRecord(some)).error.reason
    more = records.array_record({"other.weight": np.zeros(3, np.float32)})
    assert "affine-name" in send(arrays=ArrayRecord({**arrays_of(source), **more})).error.reason
    answering(node, 2)
    assert not send(arrays=arrays_of(source)).has_error()


def test_without_a_model_it_asks_for_one_and_takes_the_clouds(link, source):
    start, send = link
    node = start(None)
    assert "edge-no-model" in send(arrays=arrays_of(source)).error.reason
    blob = np.frombuffer((source / "source.onnx").read_bytes(), np.uint8)
    answering(node, 2)
    reply = send(arrays=arrays_of(source), model=records.array_record({"onnx": blob}))
    assert not reply.has_error(), reply.error
    damaged = records.array_record({"onnx": blob[:1000]})
    assert not send(arrays=arrays_of(source), model=damaged, timeout=1.5).has_content()  # it has one; only nobody asks


def test_a_model_that_is_refused_does_not_stay(link, source, tmp_path):
    """What the cloud sent is of no use: it is gone, and the next one is taken. An operator's own file stays."""
    start, send = link
    node = start(None)
    blob = np.frombuffer((source / "source.onnx").read_bytes(), np.uint8)
    damaged = records.array_record({"onnx": blob[:1000]})
    assert "onnx-damaged" in send(arrays=arrays_of(source), model=damaged).error.reason
    assert not list((tmp_path / "device").rglob("model.onnx"))
    answering(node, 2)
    reply = send(arrays=arrays_of(source), model=records.array_record({"onnx": blob}))
    assert not reply.has_error(), reply.error
    (kept,) = (tmp_path / "device").rglob("model.onnx")
    node.stop()
    until(lambda: not any(thread.name == "housekeeping" for thread in threading.enumerate()))
    kept.write_bytes(blob[:1000].tobytes())  # as a device of an earlier version kept it
    node = start(None)
    assert "edge-no-model" in send(arrays=arrays_of(source)).error.reason
    assert not kept.exists()


def test_a_model_of_other_weights_is_refused_and_the_clouds_is_taken(link, source, tmp_path):
    """Names and shapes fit, so that nothing but the digest tells: scales and shifts would be those of another model."""
    start, send = link
    blob = (source / "source.onnx").read_bytes()
    right = loading.load(source / "source.onnx", "m").weights
    node = start(None)
    wrong = send(arrays=arrays_of(source), digest="0" * 64, model=onnx_record(blob))
    assert "edge-other-model" in wrong.error.reason and node.device is None
    assert not list((tmp_path / "device").rglob("model.onnx"))
    answering(node, 2)
    reply = send(arrays=arrays_of(source, 0.125), digest=right, model=onnx_record(blob))
    assert not reply.has_error() and reply.content["metrics"]["affine-version"] == 1
    # A device that serves already takes nothing in, and is sent another.
    refused = send(arrays=arrays_of(source, 0.25), digest="1" * 64)
    assert "edge-other-model" in refused.error.reason and node.device.runtime.live.affine_version == 1
    answering(node, 2, after=node.device)
    assert not send(arrays=arrays_of(source), digest=right, model=onnx_record(blob)).has_error()


def test_an_operators_model_is_left_where_it_is(link, source, tmp_path, caplog):
    start, send = link
    mine = tmp_path / "mine.onnx"
    mine.write_bytes((source / "source.onnx").read_bytes())
    node = start(mine)
    assert "--model" in send(arrays=arrays_of(source), digest="0" * 64).error.reason
    assert mine.exists() and node.device is None
    node.stop()
    # One without a digest, as an earlier version exported it, is served, and said to be so once.
    mine.write_bytes(without_digest(source / "source.onnx"))
    with caplog.at_level("WARNING", "trellis.node"):
        node = start(mine)
        for _ in range(2):
            answering(node, 2)
            assert not send(arrays=arrays_of(source), digest="0" * 64).has_error()
    assert [record.message for record in caplog.records].count("model not compared with the cloud's") == 1


def onnx_record(blob: bytes) -> ArrayRecord:
    return records.array_record({"onnx": np.frombuffer(blob, np.uint8)})


def without_digest(path: Path) -> bytes:
    import onnx

    proto = onnx.load(path)
    for entry in proto.metadata_props:
        if entry.key == "trellis.model":
            said = json.loads(entry.value)
            del said["weights"]
            entry.value = json.dumps(said)
    return proto.SerializeToString()


def test_the_trainers_options_are_the_devices(source):
    predictor = loading.load(source / "source.onnx", "m").predictor

    def duty(**trainer):
        import json

        return edge_duty.read(json.dumps({"cell": "c", "seed": 0, "scenario": {"trainer": trainer}}).encode())

    assert duty(name="cema", momentum_statistics=1.0).adapter(predictor) == (
        "prediction-bn",
        {"weight": 1.0, "moving": False},
    )
    assert duty(name="cema").adapter(predictor) == ("prediction-bn", {"weight": 0.1, "moving": True})
    assert duty(name="cema", statistics="source").adapter(predictor) == ("none", {})
    assert duty(name="cema", e_max=0.7, budget_bytes_per_hour=9.0).selection.e_max == 0.7
    everything, nothing = duty(name="cema", filter=False).selection, duty(name="tta-t3a", supports=9).selection
    assert (everything.e_max, nothing.e_max) == (float("inf"), 0.0)
    assert duty(name="tta-t3a", supports=9, lr=1).adapter(predictor) == ("t3a", {"supports": 9})
    for wrong in ({"name": "tent"}, {"name": "cema", "statistics": "cloud"}, {"name": "sgd"}):
        with pytest.raises(TrellisError, match="trainer"):
            duty(**wrong)
    for damaged in (b"", b"{}", b"[]", b'{"cell": 1, "scenario": {"trainer": []}}'):
        with pytest.raises(DataError):
            edge_duty.read(damaged)
