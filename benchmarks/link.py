"""What the gRPC link costs: an idle round, a thousand connections, a large model.

    python benchmarks/link.py             # two minutes on two quiet cores
    python benchmarks/link.py --quick     # shows that it runs, not for figures

    python benchmarks/link.py --table     # only write docs/reliability.md's table anew from the stored results

Server and nodes are processes of their own on loopback. Prints one table, and writes it into docs/reliability.md and
with its samples into ``results/link.json``.

| row | what is measured |
| --- | --- |
| idle round | whole rounds of ten nodes that do nothing, from one finished line to the next, over the whole stack |
| load | rounds of 200 nodes out of 1,000 connected ones, each fetching and sending 1 MB; the server's memory |
| throughput | one 500 MB payload to two nodes at once, over a plain socket copy of the same bytes to two readers |
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import grpc.aio
import numpy as np
import psutil

from trellis import flower, records
from trellis.runs import environment
from trellis.wire import methods
from trellis.wire.content import Record, pack
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.payload import chunks, encode

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- load: written by benchmarks/link.py -->", "<!-- load ends -->"
TARGET_IDLE_S, AIM_IDLE_S = 0.2, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few connections, small payloads")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the page's table")
    parser.add_argument("--only", action="append", choices=("idle", "load", "throughput"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "link.json")
    parser.add_argument(
        "--clients", nargs=4, type=int, metavar=("PORT", "COUNT", "BYTES", "READ"), help=argparse.SUPPRESS
    )
    given = parser.parse_args()
    if given.clients:
        port, count, size, read = given.clients
        asyncio.run(clients(port, count, size, bool(read)))
        return
    if given.table:
        write_table(json.loads(given.out.read_text())["rows"])
        return
    chosen = given.only or ["idle", "load", "throughput"]
    rows: list[dict[str, Any]] = []
    if "idle" in chosen:
        rows.append(idle(3 if given.quick else 20))
    if "load" in chosen:
        rows.append(load(*(50, 10) if given.quick else (1000, 200), rounds=2 if given.quick else 8))
    if "throughput" in chosen:
        rows.append(throughput(20_000_000 if given.quick else 500_000_000, 1 if given.quick else 5))
    print(table(rows))
    if not given.quick and not given.only:
        given.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
        write_table(rows)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| row | figure | |", "| --- | --- | --- |"]
    lines += [f"| {row['name']} | {name} | {value:.4g} |" for row in rows for name, value in row["figures"].items()]
    return "\n".join(lines)


def write_table(rows: list[dict[str, Any]]) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}")


# -- an idle round --------------------------------------------------------------------------------------


def idle(rounds: int) -> dict[str, Any]:
    """Return the time of rounds in which nobody trains: everything a deployed round costs beside the work."""
    from measuring import NULL

    from trellis import experiment, scenario
    from trellis.deploy import serving
    from trellis.grids.grpc import Settings
    from trellis.runs import Run

    flower.quiet()
    nodes: list[subprocess.Popen[bytes]] = []
    moments: list[float] = []
    with tempfile.TemporaryDirectory(prefix="trellis-bench-") as folder:
        path = Path(folder)
        code = (HERE / "null_trainer.py").read_text()
        (path / "null_trainer.py").write_text(code)
        (path / "bench.yaml").write_text(NULL.format(clients=10, rounds=rounds + 3, cohort=10))
        from trellis.wire.nodes import digest

        def listening(port: int) -> None:
            for client in range(10):
                command = [sys.executable, "-c", "from trellis.cli import main; main()", "join", f"127.0.0.1:{port}"]
                command += ["--insecure", "--node-config", f"client={client}", "--state", str(path / f"node{client}")]
                command += ["--code", str(path), "--allow-code", digest(code.encode())]
                nodes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

        run = Run.create(path / "runs", scenario.load(path / "bench.yaml"))
        hooks = experiment.Hooks(on_round=lambda *_: moments.append(time.perf_counter()))
        options = serving.Options(Settings(give_up_after_s=600.0))
        outcome = experiment.execute(run, hooks, serving.grids(options, "bench", listening))
        for error in outcome.failed.values():
            raise error
        for node in nodes:
            node.wait(60)
    spans = [b - a for a, b in itertools.pairwise(moments[3:])]
    return {
        "name": "idle round, 10 nodes",
        "figures": {
            "seconds, median": median(spans),
            "seconds, most": max(spans),
            "target": TARGET_IDLE_S,
            "aim": AIM_IDLE_S,
        },
        "samples": spans,
    }


# -- many connections -----------------------------------------------------------------------------------


def load(connected: int, cohort: int, rounds: int) -> dict[str, Any]:
    """Return round times and the server's memory with many connections, of which some work."""
    from flwr.app import ConfigRecord, Message, RecordDict

    from trellis.grids.grpc import GrpcGrid, Settings

    size = 1_000_000
    with GrpcGrid(connected, Settings(give_up_after_s=600.0), min_clients=connected) as grid:
        cell = {"rounds": {"clients_per_round": cohort}, "evaluation": {"clients": cohort}}
        grid.describe("cell", cell, 0)
        before = psutil.Process().memory_info().rss
        started = time.perf_counter()
        workers = [start_clients(grid.link.port, connected // 2, size, True) for _ in range(2)]
        grid.get_node_ids()
        joining = time.perf_counter() - started
        idle_rss = psutil.Process().memory_info().rss
        spans, peak = [], Peak()
        weights = np.zeros(size // 4, np.float32)
        with peak:
            for number in range(rounds):
                arrays = records.array_record({"w": weights + number})
                content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": number})})
                first = number * cohort
                chosen = [flower.node_of((first + i) % connected) for i in range(cohort)]
                messages = [Message(content, node, "train") for node in chosen]
                started = time.perf_counter()
                good = sum(reply.has_content() for reply in grid.stream(messages, timeout=300.0))
                spans.append(time.perf_counter() - started)
                assert good == cohort, f"{good} of {cohort}"
    for worker in workers:
        worker.wait(120)
    return {
        "name": f"load, {cohort} of {connected} nodes, 1 MB each way",
        "figures": {
            "seconds a round, median": median(spans[1:]),
            "seconds a round, most": max(spans[1:]),
            "MB each way in a second": 2 * cohort * size / 1e6 / median(spans[1:]),
            "seconds until all were connected": joining,
            "server MB, before": before / 1e6,
            "server MB, all connected": idle_rss / 1e6,
            "server MB, most in rounds": peak.rss / 1e6,
        },
        "samples": spans,
    }


# -- a large model --------------------------------------------------------------------------------------


def throughput(size: int, repeats: int) -> dict[str, Any]:
    """Return how long one payload takes to two nodes, over a plain copy through two sockets."""
    from flwr.app import ConfigRecord, Message, RecordDict

    from trellis.grids.grpc import GrpcGrid, Settings

    weights = np.random.default_rng(0).random(size // 8)  # nothing that anything could shorten
    ratios, linked, plain = [], [], []
    with GrpcGrid(2, Settings(give_up_after_s=600.0, max_payload_bytes=2 * size)) as grid:
        grid.describe("cell", {"rounds": {"clients_per_round": 2}, "evaluation": {"clients": 2}}, 0)
        workers = [start_clients(grid.link.port, 1, 8, True) for _ in range(2)]
        grid.get_node_ids()
        arrays = records.array_record({"w": weights})
        for number in range(repeats + 1):
            content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": number})})
            started = time.perf_counter()
            replies = list(grid.stream([Message(content, flower.node_of(i), "train") for i in range(2)], timeout=300.0))
            seconds = time.perf_counter() - started
            assert all(reply.has_content() for reply in replies)
            copied = plain_copy(weights)
            if number:  # the first finds cold pages
                linked.append(seconds)
                plain.append(copied)
                ratios.append(seconds / copied)
    for worker in workers:
        worker.wait(60)
    return {
        "name": f"throughput, {size / 1e6:.0f} MB to two nodes",
        "figures": {
            "over a plain socket copy": median(ratios),
            "seconds, link": median(linked),
            "seconds, plain copy": median(plain),
            "MB a second, both together": 2 * size / 1e6 / median(linked),
        },
        "samples": ratios,
    }


def plain_copy(weights: np.ndarray[Any, Any]) -> float:
    """Return how long the same bytes take to two reading processes over plain loopback sockets."""
    code = (
        "import socket,sys\ns=socket.create_connection(('127.0.0.1',int(sys.argv[1])))\n"
        "b=bytearray(1<<20)\nn=0\nwhile k:=s.recv_into(b): n+=k\ns.close()\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        readers = [subprocess.Popen([sys.executable, "-S", "-c", code, str(port)]) for _ in range(2)]
        ends = [listener.accept()[0] for _ in readers]
        data = memoryview(weights).cast("B")
        started = time.perf_counter()

        def send(end: socket.socket) -> None:
            with end:
                end.sendall(data)

        threads = [threading.Thread(target=send, args=(end,)) for end in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for reader in readers:
            reader.wait()
        return time.perf_counter() - started


# -- nodes that answer at once --------------------------------------------------------------------------


def start_clients(port: int, count: int, size: int, read: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(Path(__file__)), "--clients", str(port), str(count), str(size), str(int(read))]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


async def clients(port: int, count: int, size: int, read: bool) -> None:
    """Be many nodes in one process, each with a connection of its own, until the server says goodbye."""
    answer = pack(
        {
            "arrays": Record("arrays", {"w": np.ones(size // 4, np.float32)}),
            "metrics": Record("metrics", {"num-examples": 1}),
        }
    )
    await asyncio.gather(*(client(port, f"{os.getpid()}-{number}", answer, read) for number in range(count)))


async def client(port: int, name: str, answer: bytes, read: bool) -> None:
    options = [*methods.KEEPALIVE, ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        calls = methods.stubs(channel)
        request = pb.JoinRequest(protocol=1, node=name, instance=name, kind=pb.NODE_KIND_TRAIN)
        session = (await calls["Join"](request)).session
        async for event in calls["Work"](pb.WorkRequest(session=session)):
            what = event.WhichOneof("event")
            if what == "goodbye":
                return
            if what != "task":
                continue
            for record in event.task.records:
                if read and not record.payload.inline:
                    fetched = 0
                    async for part in calls["Fetch"](pb.FetchRequest(session=session, digest=record.payload.digest)):
                        fetched += len(part.data)
                    assert fetched == record.payload.size
            payload, data = encode(answer)
            payload.inline = b""

            async def parts(task: str = event.task.id, payload: pb.Payload = payload, data: bytes = data) -> Any:
                yield pb.SubmitRequest(header=pb.SubmitHeader(session=session, task_id=task, answer=payload))
                for chunk in chunks(data):
                    yield pb.SubmitRequest(data=chunk)

            await calls["Submit"](parts())


class Peak:
    """The highest resident memory of this process while it is entered."""

    def __init__(self) -> None:
        self.rss = 0
        self._over = threading.Event()

    def __enter__(self) -> Peak:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._over.wait(0.02):
            self.rss = max(self.rss, process.memory_info().rss)


if __name__ == "__main__":
    main()
