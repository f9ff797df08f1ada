"""The server of the Open Inference Protocol: over real sockets, with others' clients, under load, and when it ends."""

from __future__ import annotations

import importlib.util
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tiny_edge import CLASSES, PREPROCESSING, SHAPE, Tiny, call, floats, images, refused, request, serving, tiny_model
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

import trellis
from trellis.errors import DataError, GridError
from trellis_clients.edge.generated import open_inference_pb2 as oip
from trellis_clients.edge.housekeeping import Housekeeper
from trellis_clients.edge.model import Model
from trellis_clients.edge.predictor import Prediction
from trellis_clients.edge.runtime import Runtime, Settings
from trellis_clients.edge.server import Address, EdgeServer, host_and_port
from trellis_clients.edge.turnstile import QueueFullError, Turnstile

ROOT = Path(__file__).resolve().parents[2]


# -- the protocol -----------------------------------------------------------------------------------------


def test_generated_code_is_that_of_the_protos():
    spec = importlib.util.spec_from_file_location("generate_protos", ROOT / "protos" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for proto, folder in generate.TARGETS.items():
        for name, text in generate.generate(proto).items():
            assert (ROOT / folder / name).read_text() == text, f"run `make protos`: {name} is not what {proto} says"


def test_the_wire_is_that_of_another_implementation():
    """Every message, field, number and type of the standard's six calls."""

    def described(descriptor):
        return {
            field.name: (
                field.number,
                field.type,
                field.is_repeated,
                field.message_type and described(field.message_type),
                field.containing_oneof and field.containing_oneof.name,
            )
            for field in descriptor.fields
        }

    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    ours = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert ours.full_name == theirs.full_name
    assert len(ours.methods) == 6
    for method in ours.methods:
        other = theirs.methods_by_name[method.name]
        for mine, yours in ((method.input_type, other.input_type), (method.output_type, other.output_type)):
            assert mine.full_name == yours.full_name
            assert described(mine) == described(yours)


@pytest.fixture(scope="module")
def served():
    with serving(metrics="127.0.0.1:0") as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    with triton.InferenceServerClient(served[0].where) as client:
        yield client


def asked(x, datatype="FP32", name="input"):
    tensor = triton.InferInput(name, list(x.shape), datatype)
    tensor.set_data_from_numpy(x)
    return [tensor]


def test_tritons_client_sees_server_and_model(client):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    about = client.get_server_metadata()
    assert (about.name, about.version, list(about.extensions)) == (
        "trellis-edge",
        trellis.__version__,
        ["classification"],
    )
    model = client.get_model_metadata("tiny", as_json=True)
    assert model["inputs"] == [{"name": "input", "datatype": "FP32", "shape": ["-1", "1", "4", "4"]}]
    assert [(o["name"], o["datatype"]) for o in model["outputs"]] == [
        ("logits", "FP32"),
        ("probabilities", "FP32"),
        ("labels", "BYTES"),
    ]


def test_tritons_client_gets_the_models_answers(client):
    x = images(5)
    result = client.infer("tiny", asked(x), request_id="r1")
    logits = Tiny()(x).logits
    np.testing.assert_allclose(result.as_numpy("logits"), logits, rtol=1e-6)
    probabilities = result.as_numpy("probabilities")
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        np.log(probabilities[:, 0] / probabilities[:, 1]), logits[:, 0] - logits[:, 1], rtol=1e-3
    )
    assert [name.decode() for name in result.as_numpy("labels")] == [CLASSES[k] for k in logits.argmax(1)]
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("r1", "tiny", "1")


def test_tritons_client_sends_pixels_and_asks_for_classes(client):
    pixels = np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8)
    outputs = [triton.InferRequestedOutput("probabilities", class_count=2)]
    result = client.infer("tiny", asked(pixels, "UINT8"), outputs=outputs)
    best = result.as_numpy("probabilities")
    logits = Tiny()(PREPROCESSING.to_inputs(pixels / np.float32(255))).logits
    assert best.shape == (3, 2)
    for row, scores in zip(best, logits, strict=True):
        for text, k in zip(row, np.argsort(-scores)[:2], strict=True):
            value, index, label = text.decode().split(":")
            assert (int(index), label) == (k, CLASSES[k]) and 0 <= float(value) <= 1


@pytest.mark.parametrize(
    ("ask", "code", "says"),
    [
        (lambda c: c.infer("other", asked(images(1))), "NOT_FOUND", "'tiny' is served"),
        (lambda c: c.infer("tiny", asked(images(1)), model_version="7"), "NOT_FOUND", "no version '7'"),
        (lambda c: c.infer("", asked(images(1))), "INVALID_ARGUMENT", "names no model"),
        (lambda c: c.infer("tiny", asked(images(1), name="x")), "INVALID_ARGUMENT", "no input is named"),
        (lambda c: c.infer("tiny", asked(images(1)[..., :3])), "INVALID_ARGUMENT", "shape [1, 1, 4, 3]"),
        (lambda c: c.infer("tiny", asked(images(65))), "RESOURCE_EXHAUSTED", "up to 64"),
        (lambda c: c.infer("tiny", asked(images(9000))), "RESOURCE_EXHAUSTED", "larger than max"),
        (lambda c: c.infer("tiny", asked(images(1) * np.nan)), "INVALID_ARGUMENT", "NaN"),
        (lambda c: c.is_model_ready("other"), "NOT_FOUND", "'tiny' is served"),
        (lambda c: c.get_model_metadata("other"), "NOT_FOUND", "'tiny' is served"),
        (lambda c: c.get_model_repository_index(), "UNIMPLEMENTED", ""),
    ],
)
def test_tritons_client_gets_clear_codes(client, ask, code, says):
    with pytest.raises(InferenceServerException) as caught:
        ask(client)
    assert caught.value.status() == f"StatusCode.{code}"
    assert says in caught.value.message()
    assert client.is_server_live()


def test_bytes_that_are_no_message_are_the_callers_fault(served):
    _, channel = served
    assert refused(channel, b"\x0f\x0f").code() is StatusCode.INVALID_ARGUMENT
    for method in ("ServerLive", "ModelReady", "ModelMetadata"):
        assert refused(channel, b"\x0a\xff", method).code() is StatusCode.INVALID_ARGUMENT


def test_typed_contents_get_the_same_answer(served):
    _, channel = served
    x = images(3)
    raw = call(channel, "ModelInfer", request(x))
    typed = call(channel, "ModelInfer", request(x, raw=False))
    assert list(typed.outputs[0].contents.fp32_contents) == floats(raw, "logits").ravel().tolist()
    assert [each.decode() for each in typed.outputs[2].contents.bytes_contents] == [
        CLASSES[k] for k in floats(raw, "logits").argmax(1)
    ]


# -- beside inference -------------------------------------------------------------------------------------


def test_metrics_count_what_happened(served):
    server, channel = served

    def scraped():
        with urllib.request.urlopen(server.metrics_where, timeout=10) as page:
            lines = page.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = scraped()
    call(channel, "ModelInfer", request(images(7)))
    refused(channel, request(images(1), name="wrong"))
    after = scraped()

    def rise(name):
        return after[name] - before.get(name, 0)

    assert rise('trellis_edge_requests_total{code="OK",method="ModelInfer"}') == 1
    assert rise('trellis_edge_requests_total{code="INVALID_ARGUMENT",method="ModelInfer"}') == 1
    assert rise('trellis_edge_request_seconds_count{method="ModelInfer"}') == 2
    assert rise("trellis_edge_examples_total") == rise("trellis_edge_entropy_nats_count") == 7
    assert after["process_resident_memory_bytes"] > 1e6
    assert any(name.startswith("trellis_edge_model_info{") and 'name="tiny"' in name for name in after)


def test_reflection_describes_the_protocol(served):
    _, channel = served
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
    }
    pool = descriptor_pool.DescriptorPool(database)
    service = pool.FindServiceByName("inference.GRPCInferenceService")
    expected, found = descriptor_pb2.ServiceDescriptorProto(), descriptor_pb2.ServiceDescriptorProto()
    oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].CopyToProto(expected)
    service.CopyToProto(found)
    assert found == expected
    pool.FindServiceByName("grpc.health.v1.Health")


def test_health_is_the_standard_service_and_says_when_the_server_ends():
    statuses = []
    with serving() as (server, channel):
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "inference.GRPCInferenceService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=10)
        assert caught.value.code() is StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=30)
        statuses.append(next(watch).status)
        ending = threading.Thread(target=server.stop, args=(2,))
        ending.start()
        statuses.append(next(watch).status)
        watch.cancel()
        ending.join()
    serving_, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert statuses == [serving_, not_serving]


# -- order, limits, deadlines -----------------------------------------------------------------------------


class Slow(Tiny):
    """Stays in a batch until it is let go, and writes down what it answered."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.inside, self.answered = threading.Event(), threading.Event(), []
        self.go.set()

    def __call__(self, x, **inputs):
        self.inside.set()
        assert self.go.wait(30)
        self.answered.append(float(x.flat[0]))
        return super().__call__(x, **inputs)

    def hold(self) -> None:
        self.go.clear()
        self.inside.clear()


@pytest.fixture
def slow():
    predictor = Slow()
    runtime = Runtime(tiny_model(predictor=predictor), Settings(queue=3))
    predictor.answered.clear()
    with serving(runtime) as (server, channel):
        yield predictor, server, channel
        predictor.go.set()


def numbered(k):
    x = images(1)
    x.flat[0] = k
    return request(x).SerializeToString()


def later(channel, data, timeout=20.0):
    return channel.unary_unary("/inference.GRPCInferenceService/ModelInfer").future(data, timeout=timeout)


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def test_tickets_are_served_in_the_order_of_arrival():
    turnstile, order = Turnstile(50), []
    first = turnstile.ticket()
    tickets = [turnstile.ticket() for _ in range(20)]

    def go(k):
        with tickets[k]:
            order.append(k)

    with ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(go, k) for k in reversed(range(20))]
        first.end()
        for future in futures:
            future.result(10)
    assert order == list(range(20))
    assert len(turnstile) == 0


def test_a_ticket_that_is_given_up_lets_the_next_one_through():
    turnstile = Turnstile(3)
    first, second, third = (turnstile.ticket() for _ in range(3))
    with pytest.raises(QueueFullError):
        turnstile.ticket()
    assert not third.wait(0.01)
    first.give_up()  # it is its turn: it keeps it
    assert first.wait(0) and not second.called.is_set()
    second.give_up()
    assert not second.wait(0)
    first.end()
    assert third.wait(0)
    first.end()
    turnstile.ticket(always=True).end()
    third.end()
    assert len(turnstile) == 0


def test_batches_are_answered_in_the_order_they_came(slow):
    predictor, server, channel = slow
    predictor.hold()
    calls = []
    for k in range(3):
        calls.append(later(channel, numbered(k)))
        until(lambda k=k: len(server.runtime.turnstile) == k + 1)
    predictor.go.set()
    for each in calls:
        each.result(20)
    assert predictor.answered == [0, 1, 2]


def test_a_full_queue_says_so_at_once_and_health_still_answers(slow):
    predictor, server, channel = slow
    predictor.hold()
    calls = [later(channel, numbered(k)) for k in range(3)]
    until(lambda: len(server.runtime.turnstile) == 3)
    error = refused(channel, request(images(1)))
    assert error.code() is StatusCode.RESOURCE_EXHAUSTED and "3 batches are waiting" in error.details()
    assert call(channel, "ServerReady", oip.ServerReadyRequest()).ready
    stub = health_pb2_grpc.HealthStub(channel)
    assert stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status == health_pb2.HealthCheckResponse.SERVING
    predictor.go.set()
    assert all(each.result(20) for each in calls)


def test_a_batch_whose_deadline_has_passed_is_not_computed(slow):
    predictor, server, channel = slow
    predictor.hold()
    first = later(channel, numbered(1))
    assert predictor.inside.wait(10)
    with pytest.raises(grpc.RpcError) as caught:
        later(channel, numbered(2), timeout=0.2).result()
    assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
    cancelled = later(channel, numbered(3))
    until(lambda: len(server.runtime.turnstile) == 2)
    cancelled.cancel()
    until(lambda: len(server.runtime.turnstile) == 1)
    predictor.go.set()
    first.result(20)
    call(channel, "ModelInfer", numbered(4))
    assert predictor.answered == [1, 4]
    count = server.runtime.metrics.registry.get_sample_value
    for code in ("DEADLINE_EXCEEDED", "CANCELLED"):
        until(lambda c=code: count("trellis_edge_requests_total", {"method": "ModelInfer", "code": c}) == 1)


def test_nobody_waits_longer_than_the_server_allows():
    predictor = Slow()
    runtime = Runtime(tiny_model(predictor=predictor))
    with serving(runtime, request_seconds=0.1) as (_, channel):
        predictor.hold()
        first = later(channel, numbered(1))
        assert predictor.inside.wait(10)
        error = refused(channel, request(images(1)))
        assert error.code() is StatusCode.DEADLINE_EXCEEDED and "did not come within 0.1 s" in error.details()
        predictor.go.set()
        first.result(20)


def test_a_fault_in_the_model_is_internal_and_the_server_stays_up():
    class Faulty(Tiny):
        fault = None

        def __call__(self, x, **inputs):
            if self.fault:
                raise self.fault
            return super().__call__(x, **inputs)

    predictor = Faulty()
    with serving(Runtime(tiny_model(predictor=predictor))) as (_, channel):
        for fault in (RuntimeError("a\nlong story"), MemoryError(), DataError("x", "not for this model")):
            predictor.fault = fault
            error = refused(channel, request(images(1)))
            assert error.code() is StatusCode.INTERNAL and "story" not in error.details()
        predictor.fault = None
        assert call(channel, "ModelInfer", request(images(1))).model_name == "tiny"


# -- the end ----------------------------------------------------------------------------------------------


def test_what_is_being_answered_when_the_server_ends_is_answered(slow):
    predictor, server, channel = slow
    predictor.hold()
    going = later(channel, numbered(1))
    assert predictor.inside.wait(10)
    ending = threading.Thread(target=server.stop, args=(20,))
    ending.start()
    until(lambda: server.service.stopping)
    with grpc.insecure_channel(server.where) as other:
        until(lambda: refused(other, request(images(1))).code() is StatusCode.UNAVAILABLE, seconds=60)
    predictor.go.set()
    assert oip.ModelInferResponse.FromString(going.result(20)).model_name == "tiny"
    ending.join(20)
    assert not ending.is_alive()


def test_a_batch_that_never_ends_does_not_hold_the_server_for_ever(slow, tmp_path):
    predictor, server, channel = slow
    call(channel, "ModelInfer", numbered(0))
    predictor.hold()
    going = later(channel, numbered(1))
    assert predictor.inside.wait(10)
    began = time.monotonic()
    server.stop(0.2)
    assert time.monotonic() - began < 10
    with pytest.raises(grpc.RpcError):
        going.result(20)
    assert not server.runtime.save(0.05)
    predictor.go.set()
    until(lambda: len(server.runtime.turnstile) == 0)


def test_an_address_that_is_taken_is_one_line(served):
    server, _ = served
    for address in (Address(server.where, None), Address("127.0.0.1:0", server.metrics_where[7:].partition("/")[0])):
        with pytest.raises(GridError, match="listen on") as caught:
            EdgeServer(Runtime(tiny_model()), address).start()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["", "8001", "host:", "host:port", "host:70000", ":80"])
def test_an_address_that_is_none_is_one_line(address):
    with pytest.raises(GridError, match="is not host:port"):
        host_and_port(address)


def test_unix_sockets_serve_too(tmp_path):
    with serving(grpc=f"unix:{tmp_path}/edge.sock") as (_, channel):
        assert call(channel, "ServerLive", oip.ServerLiveRequest()).live


# -- swaps ------------------------------------------------------------------------------------------------


class Load:
    """Four clients that ask without pause, and write down what they got and when."""

    def __init__(self, where: str, x) -> None:
        self.data = request(x).SerializeToString()
        self.where, self.stop = where, threading.Event()
        self.answers, self.errors = [], []
        self.threads = [threading.Thread(target=self._ask) for _ in range(4)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join(30)

    def _ask(self) -> None:
        with grpc.insecure_channel(self.where, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            while not self.stop.is_set():
                asked_at = time.monotonic()
                try:
                    answer = call(channel, "ModelInfer", self.data)
                except grpc.RpcError as error:
                    self.errors.append(error)
                else:
                    self.answers.append((asked_at, answer))

    def more(self, count: int = 25) -> None:
        wanted = len(self.answers) + count
        until(lambda: len(self.answers) >= wanted or self.errors)


class Torn(Tiny):
    """Slow between reading, and between writing, weight and bias: what is not kept apart shows."""

    def __call__(self, x, **inputs):
        weight = self._affine["norm.weight"]
        time.sleep(0.001)
        features = (x.reshape(len(x), -1) * weight + self._affine["norm.bias"]).astype(np.float32)
        return Prediction(features @ self.head[0].T + self.head[1], features, None)

    def load_affine(self, arrays):
        for name, values in arrays.items():
            super().load_affine({name: values})
            time.sleep(0.003)


def test_affine_parameters_and_models_swap_in_without_dropping_a_request():
    """Under load from four clients: every request is answered, by one model as a whole, and after a swap by the new."""
    x = images(4)
    runtime = Runtime(tiny_model(predictor=Torn()), Settings(queue=32))
    expected, swapped_at = {("1", 0): Tiny()(x).logits}, {}
    with serving(runtime) as (server, _), Load(server.where, x) as load:
        load.more()
        for step in range(1, 7):
            oracle = Tiny(step // 3)
            arrays = {name: values + step / 4 for name, values in Tiny().affine().items()}
            if step % 3 == 0:
                runtime.swap_model(tiny_model(step // 3, Torn(step // 3)))
            else:
                runtime.swap_affine(arrays)
                oracle.load_affine(arrays)
            key = str(runtime.live.version), runtime.live.affine_version
            swapped_at[key] = time.monotonic()
            expected[key] = oracle(x).logits
            load.more()
    assert load.errors == []
    assert len(expected) == 7
    seen = set()
    for asked_at, answer in load.answers:
        key = answer.model_version, answer.parameters["affine_version"].int64_param
        seen.add(key)
        np.testing.assert_allclose(floats(answer, "logits"), expected[key], rtol=1e-5)
        due = [each for each, when in swapped_at.items() if when <= asked_at]
        assert not due or list(expected).index(key) >= list(expected).index(due[-1])
    assert seen == set(expected)
    assert not np.allclose(expected["1", 0], expected["1", 1])


def test_requests_that_wait_during_a_swap_get_the_new_models_preprocessing(slow):
    predictor, server, channel = slow
    pixels = np.full((1, *SHAPE), 200, np.uint8)
    predictor.hold()
    first = later(channel, numbered(1))
    assert predictor.inside.wait(10)
    waits = later(channel, request(pixels, datatype="UINT8").SerializeToString())
    until(lambda: len(server.runtime.turnstile) == 2)
    other = Model(Tiny(9), "tiny", "seed-9", type(PREPROCESSING)((0.1,), (0.9,)), "input")
    swap = threading.Thread(target=server.runtime.swap_model, args=(other,))
    # The swap's ticket comes behind the request that waits; put it before, as if it had come first.
    with server.runtime.turnstile._lock:
        place = server.runtime.turnstile._out.pop()
    swap.start()
    until(lambda: len(server.runtime.turnstile) == 2)
    with server.runtime.turnstile._lock:
        server.runtime.turnstile._out.append(place)
    predictor.go.set()
    first.result(20)
    answer = oip.ModelInferResponse.FromString(waits.result(20))
    swap.join(20)
    assert answer.model_version == "2"
    logits = Tiny(9)(other.preprocessing.to_inputs(pixels / np.float32(255))).logits
    np.testing.assert_allclose(floats(answer, "logits"), logits, rtol=1e-5)


def test_a_model_of_other_classes_or_shape_does_not_swap_in():
    class Other(Tiny):
        classes = ("ant", "bee", "cow")

    class Wide(Tiny):
        shape = (1, 2, 8)

    runtime = Runtime(tiny_model())
    for predictor in (Other(), Wide()):
        with pytest.raises(DataError, match="the new model's"):
            runtime.swap_model(tiny_model(predictor=predictor))
    assert runtime.live.version == 1


def test_new_files_are_taken_in_and_bad_ones_refused(tmp_path):
    """As the command watches them; the file of this model is its seed."""

    def load(path):
        if not path.read_text().isdecimal():
            raise DataError("edge-model", f"{path} is no model")
        return tiny_model(int(path.read_text()))

    def put(path, write):
        write(path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    model, affine = tmp_path / "m.onnx", tmp_path / "m.affine.npz"
    model.write_text("0")
    runtime = Runtime(tiny_model())
    keeper = Housekeeper(runtime, model, affine, load)
    keeper.look()
    assert (runtime.live.version, runtime.live.affine_version) == (1, 0)

    def arrays(path):
        with path.open("wb") as file:
            np.savez(file, **{"norm.bias": np.ones(16)})

    put(affine, arrays)
    keeper.look()
    keeper.look()
    assert (runtime.live.version, runtime.live.affine_version) == (1, 1)
    bad = {
        "text": lambda path: path.write_text("hello"),
        "one array": lambda path: path.write_bytes(_npy(np.ones(3))),
        "objects": lambda path: path.write_bytes(_npz(a=np.array([{}], object))),
        "names": lambda path: path.write_bytes(_npz(other=np.ones(16))),
        "numbers": lambda path: path.write_bytes(_npz(**{"norm.bias": np.full(16, np.nan)})),
        "strings": lambda path: path.write_bytes(_npz(**{"norm.bias": np.array(["a"] * 16)})),
        "cut": lambda path: path.write_bytes(_npz(**{"norm.bias": np.ones(16)})[:-40]),
    }
    for write in bad.values():
        put(affine, write)
        keeper.look()
        assert (runtime.live.version, runtime.live.affine_version) == (1, 1)
    put(model, lambda path: path.write_text("no model"))
    keeper.look()
    assert runtime.live.version == 1
    put(model, lambda path: path.write_text("4"))
    keeper.look()
    assert (runtime.live.version, runtime.live.affine_version) == (2, 0)
    x = images(2)
    np.testing.assert_array_equal(runtime.predict(x).logits, Tiny(4)(x).logits)
    count = runtime.metrics.registry.get_sample_value
    assert count("trellis_edge_swaps_total", {"what": "affine", "outcome": "taken"}) == 1
    assert count("trellis_edge_swaps_total", {"what": "affine", "outcome": "refused"}) == 2


def _npz(**arrays) -> bytes:
    import io

    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def _npy(array) -> bytes:
    import io

    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()
