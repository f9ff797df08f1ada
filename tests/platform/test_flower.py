"""The private touches on Flower. If one of these fails, a new Flower has changed what trellis/flower.py stands on."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from trellis import flower, records
from trellis.grids.base import Layer
from trellis.grids.foreign import ForeignGrid
from trellis.grids.local import LocalGrid


def message() -> Message:
    flower.enter_run()
    return flower.number([Message(RecordDict(), flower.node_of(3), "train")])[0]


def test_a_message_needs_an_identity_and_gets_an_id():
    code = "from flwr.app import Message, RecordDict\nMessage(RecordDict(), 5, 'train')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert "TaskIdentity" in result.stderr, "Flower no longer needs TaskIdentity: drop it from flower.py"
    first, second = message(), message()
    assert first.metadata.message_id
    assert first.metadata.message_id != second.metadata.message_id
    assert flower.client_of(first.metadata.dst_node_id) == 3


def test_replies_name_the_message_and_the_node():
    sent = message()
    for reply in (flower.reply(RecordDict(), sent), flower.failure(sent, flower.FAILED_CLIENT, "why")):
        assert reply.metadata.reply_to_message_id == sent.metadata.message_id
        assert reply.metadata.src_node_id == sent.metadata.dst_node_id
    refused = flower.refusal(flower.reply(RecordDict(), sent), "why")
    assert refused.has_error()
    assert refused.error.reason == "why"
    assert isinstance(refused.error, Error)
    assert refused.metadata.src_node_id == sent.metadata.dst_node_id


def test_telemetry_is_off():
    import os

    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def plus_one() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(received: Message, _) -> Message:
        arrays = {name: records.view(array) + 1 for name, array in received.content["arrays"].items()}
        content = RecordDict({"metrics": MetricRecord({"num-examples": 2, "loss": 0.5})})
        content["arrays"] = records.array_record(arrays)
        return Message(content, reply_to=received)

    return app


@pytest.mark.parametrize("wrap", [lambda grid: grid, Layer, ForeignGrid], ids=["local", "layer", "foreign"])
def test_flowers_own_loop_runs_on_our_grids(wrap):
    grid = wrap(LocalGrid(plus_one(), 4))
    start = records.array_record({"w": np.zeros(3, np.float32)})
    result = FedAvg(fraction_evaluate=0.0).start(grid, start, num_rounds=3)
    np.testing.assert_allclose(result.arrays["w"].numpy(), 3.0, rtol=1e-6)


def test_a_client_that_changes_its_records_changes_nobody_elses():
    seen = []
    app = ClientApp()

    @app.train()
    def train(received: Message, _) -> Message:
        seen.append((received.content["config"].get("mark"), list(received.content["arrays"])))
        received.content["config"]["mark"] = "changed"
        del received.content["arrays"]["w"]
        return Message(RecordDict(), reply_to=received)

    from flwr.app import ConfigRecord

    grid = LocalGrid(app, 2)
    content = RecordDict({"config": ConfigRecord({"a": 1}), "arrays": records.array_record({"w": np.zeros(2)})})
    list(grid.stream([Message(content, node, "train") for node in grid.get_node_ids()]))
    assert seen == [(None, ["w"]), (None, ["w"])]
