"""CEMA from a scenario file: runs, resumes to the same bits, survives a hostile device, and beats the source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from federations import lines, run, sha, write
from test_bits import resumed
from trellis import scenario
from trellis.errors import TrellisError

CEMA = """\
name: cema
data: {name: digits, size: 16}
clients: 2
partition: {name: iid, test_fraction: 0.5}
model: {name: small-cnn, width: 4, hidden: 32, norm: batch}
trainer: {name: cema, momentum_statistics: 1.0, stream: {severity: 3.0, segment: 4, batch_size: 32}}
strategy: {name: cema, batches: 2, epochs: 8, foundation: {name: small-cnn, width: 8, norm: batch}}
rounds: {count: 4, quorum: 0.5}
evaluation: {central_every: 4, federated_every: 0}
probe: {every: 0, least: 0}
runtime: {grid: local}
"""
SEPARATE = CEMA.replace("batches: 2,", "batches: 2, copies: separate,")
TENT = CEMA.replace("name: cema, momentum_statistics: 1.0", "name: tent")

HOSTILE = """\
import torch
from trellis.registry import register
from trellis_clients.trainers.cloud_edge.cema import Cema

@register("trainers", "hostile", takes=("image",), sends="uploads")
class Hostile(Cema):
    class Config(Cema.Config):
        how: str

    def answer(self, action, model, data, state, turn):
        metrics = super().answer(action, model, data, state, turn)
        images = turn.reply["uploads"]["images"]
        if turn.client == 1:
            images = {
                "oversized": lambda: torch.zeros(5000, *self.task.shape),
                "out of range": lambda: images + 7,
                "wrong shape": lambda: images[:, :, :-1],
                "not finite": lambda: images * float("nan"),
            }[self.config.how]()
            turn.reply["uploads"] = {"images": images}
            metrics["uploaded"] = len(images)
        return metrics
"""
REASONS = {
    "oversized": "upload: 5000 images; the stream had 64",
    "out of range": "upload: pixels from",
    "wrong shape": "shape: uploads/images has shape",
    "not finite": "nonfinite: uploads/images has",
}


@pytest.mark.parametrize("text", [CEMA, SEPARATE, TENT], ids=["shared", "separate", "tent"])
def test_twice_and_resumed_give_the_same_bits(tmp_path, text):
    first = sha(tmp_path, text=text)
    assert sha(tmp_path, text=text) == first
    assert resumed(tmp_path, text) == first
    assert sha(tmp_path, ("seeds=[1]",), text) != first


def test_ray_workers_give_the_bits_of_one_process(tmp_path, ray_session):
    local = sha(tmp_path, text=CEMA)
    assert sha(tmp_path, ("runtime.grid=ray", "runtime.workers=2"), CEMA) == local


def test_a_run_beats_its_source_and_says_what_it_cost(tmp_path):
    current, outcome = run(tmp_path, text=CEMA)
    assert not outcome.failed, outcome.failed
    last = lines(current)[-1]
    source, _ = run(tmp_path, text=CEMA.replace("name: cema, momentum_statistics: 1.0", "name: tta-source"))
    plain = lines(source)[-1]["train"]
    assert last["train"]["accuracy"] > plain["accuracy"] + 0.05
    assert 0 < last["train"]["upload-share"] < 1
    assert plain["upload-share"] == 0
    assert lines(current)[0]["central"]["accuracy"] > 0.7  # before round 1 stands the trained source model
    uploads = sum(line["train"]["upload-bytes"] for line in lines(current)[1:])
    assert uploads == 16 * 16 * sum(line["train"]["uploaded"] for line in lines(current)[1:])
    assert uploads <= sum(line["bytes_up"] for line in lines(current)) < 1.05 * uploads
    down = [line["bytes_down"] for line in lines(current)]
    assert down[1] > 10 * down[2] and down[2] == down[3]  # the source model went once
    sent = load_file(current.path / "cells/main-seed0/model.safetensors")
    assert sum(values.size for values in sent.values()) == 2 * (4 + 8)
    assert all(np.isfinite(values).all() for values in sent.values())


@pytest.mark.parametrize(("how", "reason"), REASONS.items(), ids=REASONS)
def test_a_hostile_device_is_refused_and_the_rest_goes_on(tmp_path, how, reason):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    text = CEMA.replace(
        "trainer: {name: cema,", f"trainer: {{name: 'hostile.py:Hostile', how: {how}, upload: float32, filter: false,"
    )
    current, outcome = run(tmp_path, ("rounds.count=2", "strategy.epochs=1"), text)
    assert not outcome.failed, outcome.failed
    for line in lines(current)[1:]:
        (failure,) = line["failures"]
        assert failure["client"] == 1 and failure["reason"].startswith(reason)
        assert (line["cohort"], line["replies"]) == (2, 1)
        assert line["train"]["seen"] == 64
    counted = lines(current)[-1]["train"]["refused-uploads"]
    assert counted == (2 if reason.startswith("upload") else 0)


def test_trainers_of_the_family_need_the_strategy(tmp_path):
    path = write(tmp_path, CEMA.replace("strategy: {name: cema, batches: 2,", "strategy: {name: fedavg}\nx: {"))
    with pytest.raises(TrellisError):
        scenario.load(path)
    path = write(tmp_path, "\n".join(x for x in CEMA.splitlines() if not x.startswith("strategy")))
    with pytest.raises(TrellisError, match="sends uploads, but strategy 'fedavg' merges weights"):
        scenario.load(path)


def test_all_variants_of_the_bundled_scenario_read_the_same_stream():
    path = Path(__file__).resolve().parents[2] / "scenarios" / "cloud" / "cema.yaml"
    streams = [scenario.config_of(each, "trainers")[1].stream for _, each in scenario.expand(scenario.load(path))]
    assert len(streams) > 5
    assert all(stream == streams[0] for stream in streams)
