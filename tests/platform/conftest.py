"""A server's end of the link, and the calls to it."""

from __future__ import annotations

import grpc
import pytest

from link_calls import SETTINGS
from trellis.grids.grpc import GrpcGrid
from trellis.wire import methods


@pytest.fixture
def grid():
    made = GrpcGrid(3, SETTINGS, run="a-run", min_clients=1)
    made.describe("cell", {"rounds": {"clients_per_round": None}, "evaluation": {"clients": None}}, 0)
    yield made
    made.close()


@pytest.fixture
def calls(grid):
    with grpc.insecure_channel(f"127.0.0.1:{grid.link.port}") as channel:
        yield methods.stubs(channel)
