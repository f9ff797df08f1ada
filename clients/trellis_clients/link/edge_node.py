"""``trellis join --edge``: the process of a device without torch, which serves a model while the cloud adapts it.

The tasks it answers are those of the strategy ``cema``. In simulation ``train.stream`` means "go on for K batches of
your stream with these parameters"; here the stream is what outside clients send, so it means "take in these
parameters, and report when K batches' worth of examples was answered". The device never waits for the cloud: requests
are answered before, between and after tasks, and go on when the server is away or the run is over.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trellis.deploy.joining import NodeConfig, Where
from trellis.deploy.node_metrics import NodeMetrics
from trellis.deploy.stopping import AT_ONCE, Stopping
from trellis.errors import DataError, GridError, RunError, TrellisError
from trellis.wire import content as wire
from trellis.wire.generated import link_pb2 as pb
from trellis_clients.link import edge_duty
from trellis_clients.link.agenda import EndedError, TaskCancelledError
from trellis_clients.link.connection import Identity
from trellis_clients.link.edge_device import Account, Device, Serving, account_of, packed
from trellis_clients.link.lines import plain
from trellis_clients.link.store import Store, held, instance_of, name_of, write
from trellis_clients.link.working import Worker

STREAM = "train.stream"
ENCODINGS = {"none": pb.ENCODING_NONE, "zstd": pb.ENCODING_ZSTD}
LOOK_S = 0.05
"""Between looks at how much was answered."""

LAST_SHARE = 0.1
"""Share of a task's time that is kept for its answer to arrive."""

DRAIN_S = 4.0
"""Time for requests that are being answered when a device is told to stop; again as much at most for its state."""


class EdgeNode(Worker):
    """Serves, and answers the link's tasks.

    Args:
        identity: who it is, of kind ``pb.NODE_KIND_EDGE``.
        folder: of its store.
        serving: how it serves.
        model: its model's file; None takes the one that the cloud sends.
        encoding: of answers.
        announced: called with a description whenever it begins to serve.
    """

    def __init__(
        self,
        identity: Identity,
        folder: Path,
        serving: Serving,
        model: Path | None = None,
        encoding: pb.Encoding = pb.ENCODING_NONE,
        announced: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self.metrics = NodeMetrics(None)
        super().__init__(identity, folder, encoding, self._count)
        self.serving, self.model, self.announced = serving, model, announced
        self.device: Device | None = None
        self._settled: Device | None = None
        self._warned: Device | None = None
        self._key = ""
        self._stop = threading.Event()

    def run(self) -> str:
        """Serve until ``stop``; return the server's last word, "" if it was told to stop before.

        Raises:
            TrellisError: the server does not want this node, or is lost for good, before there was anything to serve;
                an address is taken.
        """
        reason = ""
        try:
            self._take_up()
            try:
                self.work()
            except EndedError as end:
                reason = str(end)
            except GridError as error:
                if self.device is None:
                    raise
                reason = str(error)
            self.connection.close("it stops")
            if self.device is not None and not self._stop.is_set():
                self.log.info("no tasks any more; serving goes on", extra={"reason": reason})
                self._stop.wait()
        finally:
            self.connection.close("it stops")
            if self.device is not None:
                self.device.stop(DRAIN_S)
        return reason

    def stop(self) -> None:
        """Make ``run`` return. A task under way is handed back: the server gives it out again. From any thread."""
        self._stop.set()
        self.connection.close("it stops")

    def store(self) -> Store | None:
        return None if self.device is None else self.device.store

    def fatal(self) -> tuple[type[TrellisError], ...]:
        return (GridError,) if self.device is None else ()  # it cannot serve where it was told to

    def _count(self, name: str, labels: Mapping[str, str]) -> None:
        self.metrics.count(name, labels)
        if name == "task" and self.device is not None:
            self.device.tasks.labels(labels["verdict"]).inc()

    # -- a task -----------------------------------------------------------------------------------------

    def submit(self, task: pb.Task) -> int:
        if task.kind != STREAM:
            raise DataError("edge-task", f"a device answers {STREAM!r}; it cannot do {task.kind!r:.80}")
        device = self._device(task)
        self._same_model(device, task)
        self._settle(device, task.id)
        store, answer = device.store, device.store.answer(task.id)
        if answer is None:
            content, account = self._streamed(task, device)
            try:
                answer = wire.pack(content)
                store.put(task.id, answer, packed(account))
            except Exception as error:
                device.kept_back(account)
                if isinstance(error, OSError):
                    raise RunError("node-store", f"{store.folder} cannot be written to: {error.strerror}") from None
                raise
        else:
            account = account_of(store.state_after(task.id))
            self.log.info("task known")
        try:
            return self._hand_in(task.id, answer, account, device)
        except TaskCancelledError:
            self.note(store.dropped, task.id)
            device.kept_back(account)
            raise

    def _hand_in(self, task: str, answer: bytes, account: Account, device: Device) -> int:
        """Submit an answer, and note down what became of it."""
        verdict, store = self.connection.submit(task, answer, encoding=self.encoding), device.store
        wanted, before = verdict in (pb.VERDICT_ACCEPTED, pb.VERDICT_DUPLICATE), store.counts(task)
        self.note(store.accepted if wanted else store.dropped, task)
        if not wanted:
            device.kept_back(account)
        elif not before:  # else the server lost it and was given it again
            device.delivered(account)
        return verdict

    def _settle(self, device: Device, current: str) -> None:
        """Ask what became of answers that the process before was killed over: nothing shall be reported twice."""
        if self._settled is device:
            return
        for task in device.store.unsettled():
            answer = device.store.answer(task)
            if task != current and answer is not None:
                self._hand_in(task, answer, account_of(device.store.state_after(task)), device)
        self._settled = device

    def _streamed(self, task: pb.Task, device: Device) -> tuple[wire.Content, Account]:
        """Take in the parameters, wait until enough was answered or the time is nearly over, and report."""
        wall, cpu = time.perf_counter(), time.process_time()
        end = time.monotonic() + task.seconds_left * (1 - LAST_SHARE)
        config, arrays = self._record(task, "config"), self._record(task, "arrays")
        batches = config.values.get("batches") if config is not None else None
        if config is not None:
            self.note_round(config.values.get("server-round"))
        if arrays is None or not isinstance(batches, int) or batches < 1:
            raise DataError(
                "edge-task", f"{STREAM!r} comes with the records 'arrays' and 'config', and 'batches' in it"
            )
        device.take_in(arrays.values)
        wanted = batches * device.duty.batch_size
        while device.answered < wanted and time.monotonic() < end:
            self.connection.go_on(task.id)
            self._stop.wait(LOOK_S)
        if not device.answered:
            raise DataError("edge-idle", f"nobody asked this device anything in {time.perf_counter() - wall:.0f} s")
        content, account = device.report(wanted)
        times = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        return {**content, "trellis.timing": wire.Record("config", times)}, account

    def _record(self, task: pb.Task, name: str) -> wire.Record | None:
        """Fetch a record of a task; the others are left where they are."""
        for each in task.records:
            if each.name == name:
                try:
                    return wire.unpack(self.connection.payload(each.payload, task.id))["record"]
                except KeyError:
                    raise DataError("records-damaged", f"the payload of record {name!r} holds no record") from None
        return None

    # -- what is served ---------------------------------------------------------------------------------

    def _device(self, task: pb.Task) -> Device:
        """Return the device for a task's cell; one that is not live yet is made and begins to serve."""
        place = self.connection.agenda.place(task.id)
        whose = f"{place.run}/{place.client}"
        key = f"{whose}/{task.setup.digest}"
        if self.device is not None and self._key == key:
            return self.device
        setup = bytes(self.connection.payload(task.setup, task.id))
        duty = edge_duty.read(setup)
        if self.device is not None and self._key == f"{whose}/{duty.cell}":  # taken up after a restart
            self._key = key
            return self.device
        store = Store(self.folder, place.run, duty.cell, place.client, place.keep_answers)
        own = store.folder / "device"
        own.mkdir(mode=0o700, exist_ok=True)
        model = self.model or own / "model.onnx"
        if not model.exists() and self.model is None:
            sent = self._record(task, "model")
            if sent is None or "onnx" not in sent.values:
                raise DataError(
                    "edge-no-model",
                    "this device has no model: give --model with the exported source model, or set"
                    " strategy.device_model so that the cloud sends it",
                )
            write(model, sent.values["onnx"].tobytes())
        write(own / "setup.json", setup)
        try:
            self._serve(duty, store, model, task)
        except DataError:
            self._forget(model)
            raise
        kept = {"run": place.run, "cell": duty.cell, "client": place.client, "keep": place.keep_answers}
        write(self.folder / "device.json", json.dumps(kept).encode())
        self._key = key
        assert self.device is not None
        return self.device

    def _same_model(self, device: Device, task: pb.Task) -> None:
        """Refuse a task that is for other weights than those this device holds: its scales and shifts fit no other.

        Raises:
            DataError: they are others. A file that the cloud sent is removed, so that the cloud's is asked for again.
        """
        config = self._record(task, "config")
        wanted = config.values.get("source-sha256") if config is not None else None
        if wanted is None or device.weights == wanted:
            return
        if device.weights is None:
            if self._warned is not device:
                self._warned = device
                reason = f"{device.model} does not say which weights it holds; export it with this version"
                self.log.warning("model not compared with the cloud's", extra={"reason": reason})
            return
        self._forget(device.model)
        raise DataError(
            "edge-other-model",
            f"{device.model} holds other weights ({device.weights:.8}…) than the scenario's source model"
            f" ({plain(str(wanted)):.8}…): export the model of strategy.source_weights for --model, or leave --model"
            " out and set strategy.device_model",
        )

    def _forget(self, model: Path) -> None:
        """Remove a model that the cloud sent and that is of no use: with the next task it sends its own."""
        if self.model is None:
            model.unlink(missing_ok=True)
            self._key = ""

    def _serve(self, duty: edge_duty.Duty, store: Store, model: Path, task: pb.Task | None = None) -> None:
        """Begin to serve; what was served before ends first, as two do not fit on one address."""
        device = Device(duty, store, model, self.serving)
        if task is not None:
            self._same_model(device, task)  # before anybody can ask it
        device.runtime.metrics.registry.register(self.metrics)  # a node's figures stand on the device's page
        if self.device is not None:
            self.device.stop(DRAIN_S)
            self.device = None
        described = device.start()
        self.device = device
        self.serving = replace(self.serving, address=device.server.where)  # port 0 stays what it became
        self.log.info("serving", extra={"cell": duty.cell})
        self.announced(described)

    def _take_up(self) -> None:
        """Serve what was served last, where anything was; without the server."""
        try:
            place = json.loads((self.folder / "device.json").read_bytes())
            client = int(place["client"])
            store = Store(self.folder, str(place["run"]), str(place["cell"]), client, int(place["keep"]))
            own = store.folder / "device"
            duty = edge_duty.read((own / "setup.json").read_bytes())
            model = self.model or own / "model.onnx"
            if not model.exists():
                return
            try:
                self._serve(duty, store, model)
            except DataError:
                self._forget(model)
                raise
            self._key = f"{place['run']}/{client}/{duty.cell}"
        except FileNotFoundError:
            return
        except GridError:
            raise  # its own address is taken
        except (TrellisError, OSError, ValueError, KeyError, TypeError) as error:
            self.log.warning("what was served last is not taken up", extra={"reason": str(error)})


def run(
    where: Where,
    stopping: Stopping,
    *,
    node: str = "",
    config: NodeConfig | None = None,
    state: Path = Path("node"),
    compression: str = "none",
    model: Path | None = None,
    serve: str = "127.0.0.1:8001",
    threads: int = 1,
    give_up_after_s: float | None = None,
    metrics_address: str | None = None,
) -> str:
    """Be a device until SIGTERM, and return the server's last word, "" if there was none.

    Args:
        where: the server and the node's credentials.
        stopping: takes SIGTERM. Requests that are being answered have time to end, and the state is kept.
        node: its name; where credentials say it, it may be empty.
        config: which client it wants to be.
        state: folder of its store.
        compression: of answers, ``none`` or ``zstd``.
        model: the exported source model; None takes the one that the cloud sends.
        serve: address for inference requests.
        threads: of ONNX Runtime.
        give_up_after_s: without the server for this long it stays away from it; serving goes on.
        metrics_address: of Prometheus metrics.

    Raises:
        TrellisError: options do not fit, or the server does not want this node.
    """
    config = config or NodeConfig()
    if config.overrides:
        raise TrellisError("usage", f"--node-config: a device has no {config.overrides[0].partition('=')[0]!r}")
    if compression not in ENCODINGS:
        raise TrellisError("usage", f"--compression is {compression!r}; there are {', '.join(ENCODINGS)}")
    if model is not None and not model.is_file():
        raise DataError("onnx-missing", f"no model can be read from {model}")
    instance = instance_of(state)
    identity = Identity(
        where.address,
        node or ("" if where.token or where.certificate else name_of(instance)),
        instance,
        client=config.client,
        kind=pb.NODE_KIND_EDGE,
        token=where.token,
        channel_credentials=where.credentials(),
        give_up_after_s=give_up_after_s,
    )
    serving = Serving(serve, metrics_address, model.stem if model else "model", threads)
    worker = EdgeNode(identity, state, serving, model, ENCODINGS[compression], _announce)

    with held(state), stopping.during(worker.stop, lambda: AT_ONCE):
        return worker.run()


def _announce(described: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(described) + "\n")
    sys.stdout.flush()
