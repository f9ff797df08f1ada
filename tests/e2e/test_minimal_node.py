"""A node that was written from docs/wire.md alone takes part in a federation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from deployment import serve
from federations import lines

NODE = Path(__file__).with_name("minimal_node.py")
SCENARIO = """\
name: minimal
data: digits
clients: 2
model: {name: mlp, hidden: [WIDTH]}
trainer: sgd
strategy: fedavg
rounds: {count: 2}
evaluation: {central_every: 1, federated_every: 2}
runtime: {grid: local}
"""
OURS = ["trellis", "trellis.wire", "trellis.wire.generated", "trellis.wire.generated.link_pb2"]


@pytest.mark.parametrize("width", [16, 400], ids=["inline", "fetched"])
def test_two_such_nodes_make_the_average_that_they_should(tmp_path, width):
    """One adds 1 on 10 examples, one adds 3 on 30: each of two rounds moves every weight by 2.5."""
    nodes = []

    def listening(port):
        for client, (step, examples) in enumerate(((1.0, 10), (3.0, 30))):
            command = [sys.executable, str(NODE), f"127.0.0.1:{port}", str(client), str(step), str(examples)]
            nodes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))

    try:
        run, outcome = serve(tmp_path, listening, text=SCENARIO.replace("WIDTH", str(width)))
        said = [node.communicate(timeout=60) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    assert not outcome.failed, (outcome.failed, said)
    for out, err in said:
        *answers, goodbye, modules = out.splitlines()
        assert answers == ["train VERDICT_ACCEPTED"] * 2 + ["evaluate VERDICT_ACCEPTED"], err
        assert goodbye == "the run is over"
        assert json.loads(modules) == OURS
    last = lines(run)[-1]
    assert last["train"]["loss"] == pytest.approx(0.5)
    assert last["federated"]["accuracy"] == 0.5
    final = load_file(run.path / "cells" / "main-seed0" / "model.safetensors")
    start = {name: np.asarray(values) for name, values in _start(run).items()}
    assert final.keys() == start.keys()
    for name, values in final.items():
        np.testing.assert_allclose(values, start[name] + 5.0, rtol=1e-5, atol=1e-5)


def _start(run):
    """The weights that a run of the same scenario starts from."""
    from trellis import records, scenario
    from trellis_clients.site import Cell, Site

    (_, each), *_ = scenario.expand(run.scenario)
    arrays = Site(Cell(scenario.plain(each), 0)).initial()
    return {name: records.view(array) for name, array in arrays.items()}
