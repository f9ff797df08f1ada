"""Load on the link: many nodes, many rounds, large models, slow peers. L1 to L6 of the load battery.

The nodes are ``benchmarks/link.py --clients``: processes that hold many real connections and answer at once.
"""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from trellis import flower, records
from trellis.grids._grpc_tasks import Answer
from trellis.grids.grpc import GrpcGrid, Settings
from trellis.memory import trim
from trellis.wire import methods
from trellis.wire.generated import link_pb2 as pb

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "link.py"
MB = 1_000_000


@contextmanager
def served(num_clients, size, count=None, cohort=None, processes=2, **settings):
    """A grid with nodes that answer every task with ``size`` bytes."""
    chosen = Settings(give_up_after_s=120, **settings)
    count = num_clients if count is None else count
    with GrpcGrid(num_clients, chosen, min_clients=count) as grid:
        cohort = cohort or count
        grid.describe("cell", {"rounds": {"clients_per_round": cohort}, "evaluation": {"clients": cohort}}, 0)
        shares = [count // processes + (number < count % processes) for number in range(processes)]
        command = [sys.executable, str(BENCHMARK), "--clients", str(grid.link.port)]
        made = [subprocess.Popen([*command, str(share), str(size), "1"]) for share in shares if share]
        try:
            grid.get_node_ids()
            yield grid
        finally:
            grid.close()
            for each in made:
                each.wait(60)


def messages(nodes, number, values=None):
    arrays = records.array_record({"w": np.full(MB // 4, number, np.float32) if values is None else values})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": number})})
    return [Message(content, node, "train") for node in nodes]


def everyone(grid, number, values=None):
    """Send to all and return how long each answer took, in seconds."""
    started = time.perf_counter()
    seconds, nodes = [], list(grid.get_node_ids())
    for reply in grid.stream(messages(nodes, number, values), timeout=120):
        assert reply.has_content(), reply.error
        seconds.append(time.perf_counter() - started)
    assert len(seconds) == len(nodes)
    return seconds


@pytest.mark.battery("L1")
def test_fifty_nodes_in_one_process_and_nothing_lost():
    """Fifty nodes for three rounds, 100 KB each: every answer counts, and no payload is kept."""
    with served(50, MB // 10, processes=1) as grid:
        for number in range(3):
            everyone(grid, number)
        assert grid.link.payloads.num_bytes == 0
        assert len(grid.link.connected()) == 50


@pytest.mark.battery("L1")
@pytest.mark.slow
def test_l1_two_hundred_nodes_for_a_hundred_rounds():
    """Nothing is lost; what memory holds between rounds is at most a tenth more at the end than after twenty rounds."""
    with served(200, MB) as grid:
        memory = []
        for number in range(100):
            everyone(grid, number)
            if number >= 20:
                gc.collect()
                trim()  # else holes in the heap make it swing by two hundred megabytes
                memory.append(psutil.Process().memory_info().rss)
        assert min(memory[-30:]) <= 1.1 * min(memory[:30])
        assert grid.link.room.used == 0


def registered(grid, num_clients):
    """Register all nodes; return how much longer it takes than the least of calls, for the first and the last tenth."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{grid.link.port}") as channel:
        join, least = methods.stubs(channel)["Join"], health_pb2_grpc.HealthStub(channel).Check
        took = []
        for client in range(num_clients):
            started = time.perf_counter()
            join(pb.JoinRequest(protocol=1, node=f"n{client}", instance=f"i{client}", client=client), timeout=30)
            middle = time.perf_counter()
            least(health_pb2.HealthCheckRequest(), timeout=30)
            took.append((middle - started) / (time.perf_counter() - middle))
    assert len(grid.link.nodes) == num_clients
    tenth = num_clients // 10
    return float(np.median(took[:tenth])), float(np.median(took[-tenth:]))


def dispatched(grid, num_clients):
    """Sample a hundred clients and hand out their tasks; return seconds (median of 20 rounds)."""
    rounds = []
    for number in range(20):
        started = time.perf_counter()
        cohort = random.Random(number).sample(list(grid.get_node_ids())[:num_clients], 100)
        stream = grid.stream(messages(cohort, number, np.zeros(1, np.float32)), timeout=600)
        waiter = threading.Thread(target=next, args=(stream,))
        waiter.start()
        while sum(len(node.tasks) for node in grid.link.nodes.values()) < 100:
            time.sleep(0.001)
        rounds.append(time.perf_counter() - started)
        for node in cohort:
            client = flower.client_of(node)
            for name in list(grid.link.nodes[client].tasks):
                grid.link.call(grid.link.close_task, client, name, Answer(code=2, reason="enough"))
        waiter.join(60)
        stream.close()
    assert grid.link.payloads.num_bytes == 0
    return float(np.median(rounds))


def registering_and_dispatching(num_clients):
    """Return the two ratios of ``registered``, and how long dispatch takes with all registered over with a tenth."""
    settings = Settings(leave_after_s=600, give_up_after_s=600)
    with GrpcGrid(num_clients // 10, settings, min_clients=1) as small:
        small.describe("cell", {"rounds": {"clients_per_round": 100}, "evaluation": {"clients": 100}}, 0)
        registered(small, num_clients // 10)
        few = dispatched(small, num_clients // 10)
    with GrpcGrid(num_clients, settings, min_clients=1) as grid:
        grid.describe("cell", {"rounds": {"clients_per_round": 100}, "evaluation": {"clients": 100}}, 0)
        first, last = registered(grid, num_clients)
        return first, last, dispatched(grid, num_clients) / few


@pytest.mark.battery("L2")
def test_l2_a_thousand_registered_and_a_hundred_in_a_round():
    """A registration takes at most four times as long as a call that does nothing."""
    first, last, growth = registering_and_dispatching(1000)
    assert first <= 4
    assert last <= 4
    assert growth <= 4


@pytest.mark.slow
@pytest.mark.battery("L2")
def test_l2_ten_thousand_registered_and_a_hundred_in_a_round():
    """The last of ten thousand registers as fast as the first; ten times the nodes, at most four times the round."""
    first, last, growth = registering_and_dispatching(10_000)
    assert last <= 1.5 * first
    assert first <= 4
    assert growth <= 4


@pytest.mark.battery("L3")
@pytest.mark.slow
def test_l3_four_updates_of_500_mb_at_once():
    """The server's memory grows by at most 2.5 times the model."""
    size = 500 * MB
    values = np.random.default_rng(0).random(size // 8)
    with served(4, size, processes=4, max_payload_bytes=2 * size, uploads_bytes=2 * size, beat_s=0.5) as grid:
        gc.collect()
        before, most, over = anonymous(), [0], threading.Event()

        def watch():
            while not over.wait(0.02):
                most[0] = max(most[0], anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        count = sum(reply.has_content() for reply in grid.stream(messages(grid.get_node_ids(), 1, values), timeout=300))
        over.set()
        watcher.join()
        assert count == 4
        assert most[0] - before <= 2.5 * size  # the encoded payload and a copy while it is made; answers are in files


@pytest.mark.battery("L4")
@pytest.mark.slow
def test_l4_a_thousand_rounds_leave_nothing_behind():
    """Memory grows by at most 1 KB a round; open files and threads do not."""
    with served(10, 1000) as grid:
        process, memory = psutil.Process(), []
        for number in range(1000):
            everyone(grid, number, np.zeros(100, np.float32))
            if number == 100:
                files, threads = process.num_fds(), process.num_threads()
            if number >= 100:
                memory.append(process.memory_info().rss)
        slope = np.polyfit(range(len(memory)), memory, 1)[0]
        assert slope <= 1024
        assert process.num_fds() <= files
        assert process.num_threads() <= threads


@pytest.mark.battery("L5")
@pytest.mark.slow
def test_l5_five_hundred_connects_at_once():
    """All are served, and answer a round."""
    with served(500, 1000) as grid:
        assert len(grid.link.connected()) == 500
        everyone(grid, 1, np.zeros(100, np.float32))


@pytest.mark.battery("L6")
@pytest.mark.slow
def test_l6_fifty_peers_that_read_a_kilobyte_a_second():
    """They fetch a large payload and hardly read it. Flow control holds each back; the others are as fast as before."""
    with served(60, MB // 10, count=10, processes=1) as grid:

        def tenth(number):  # the slowest of the honest
            started = time.perf_counter()
            nodes = [flower.node_of(client) for client in range(60) if grid.link.nodes.get(client) in honest]
            for reply in grid.stream(messages(nodes, number), timeout=120):
                assert reply.has_content()
            return time.perf_counter() - started

        honest = list(grid.link.nodes.values())
        alone = sorted(tenth(number) for number in range(20))[18]
        large = grid.link.setups["large"] = os.urandom(50 * MB)
        streams = []
        over = threading.Event()

        def crawl(channel, client):
            calls = methods.stubs(channel)
            name = f"slow-{client}"
            joined = calls["Join"](pb.JoinRequest(protocol=1, node=name, instance=name), timeout=30)
            stream = calls["Fetch"](pb.FetchRequest(session=joined.session, digest="large"))
            streams.append(stream)
            try:
                for _ in stream:
                    if over.wait(10.0):  # a chunk is a megabyte: far below a kilobyte a second on the whole
                        return
            except grpc.RpcError:
                pass

        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.insecure_channel(f"127.0.0.1:{grid.link.port}", options) for _ in range(50)]
        threads = [threading.Thread(target=crawl, args=pair) for pair in zip(channels, range(50), strict=True)]
        for thread in threads:
            thread.start()
        while len(streams) < 50:
            time.sleep(0.05)
        before = psutil.Process().memory_info().rss
        beside = sorted(tenth(number) for number in range(100, 120))[18]
        grown = psutil.Process().memory_info().rss - before
        over.set()
        for stream, channel in zip(streams, channels, strict=True):
            stream.cancel()
            channel.close()
        for thread in threads:
            thread.join()
        assert beside <= 2 * alone
        assert grown <= 0.3 * 50 * len(large)  # some chunks under way for each, on both ends, and not fifty payloads
        assert len(large) == 50 * MB


def anonymous():
    """Return this process's memory that no file backs, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")
