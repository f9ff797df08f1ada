"""The contract is wide enough: one small method for everything the papers will ask of it."""

from __future__ import annotations

import pytest
from safetensors.numpy import load_file

from federations import lines, run
from trellis_clients import contract

HEAD = """\
import torch
from torch import nn
from torch.nn import functional as F
from trellis.data.base import Batch, DataSet, Split
from trellis.registry import register
from trellis.scenario import Strict
from trellis_clients.trainer import Trainer, TrainerConfig
"""

METHODS = (
    HEAD
    + '''

@register("trainers", "partial", paper="", takes=("image",), sends="weights")
class Partial(Trainer):
    """Sends the head only; the frozen body is built alike on every side and never sent."""

    class Config(TrainerConfig):
        pass

    def build(self):
        model = super().build()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("head.")
        return model

    def shared(self, model):
        return {name: v for name, v in model.state_dict().items() if name.startswith("head.")}


@register("trainers", "memory", paper="", takes=("image",), sends="weights")
class Memory(Trainer):
    """A memory per sample by index, and a moving-average teacher: both private, both across rounds."""

    class Config(TrainerConfig):
        pass

    def fit(self, model, data, state, turn):
        state.setdefault("seen", torch.zeros(len(data.train)))
        state.setdefault("teacher", {name: v.clone() for name, v in model.state_dict().items()})
        self.seen = state["seen"]
        metrics = super().fit(model, data, state, turn)
        for name, v in model.state_dict().items():
            state["teacher"][name].lerp_(v, 0.1)
        state["rounds"] = state.get("rounds", 0) + 1
        return {**metrics, "least_seen": float(state["seen"].min()), "rounds": state["rounds"]}

    def loss(self, model, batch, turn):
        self.seen[batch.index] += 1
        return super().loss(model, batch, turn)


@register("trainers", "two-models", paper="", takes=("image",), sends="weights")
class TwoModels(Trainer):
    """Two networks trained together; one travels, one stays."""

    class Config(TrainerConfig):
        pass

    def build(self):
        return nn.ModuleDict({"ours": super().build(), "mine": super().build()})

    def shared(self, model):
        return {name: v for name, v in model.state_dict().items() if name.startswith("ours.")}

    def fit(self, model, data, state, turn):
        if "mine" in state:
            model["mine"].load_state_dict(state["mine"])
        metrics = super().fit(model, data, state, turn)
        state["mine"] = {name: v.clone() for name, v in model["mine"].state_dict().items()}
        return metrics

    def loss(self, model, batch, turn):
        ours, mine = model["ours"](batch.x), model["mine"](batch.x)
        return F.cross_entropy(ours, batch.y) + F.cross_entropy(mine, batch.y) + 0.1 * F.mse_loss(ours, mine.detach())

    def evaluate(self, model, split, turn, batch_size=256):
        return super().evaluate(model["ours"], split, turn, batch_size)


@register("datasets", "with-unlabeled", kind="image")
class WithUnlabeled:
    """Digits, and a second stream without labels."""

    class Config(Strict):
        pass

    def __init__(self, config, folder):
        pass

    def load(self, seed):
        from trellis import registry
        cls = registry.load("datasets", "digits")
        data = cls(cls.Config(), None).load(seed)
        unlabeled = Split.whole(x=data.train.fields["x"].flip(-1)[:200])
        return DataSet(data.kind, data.train, data.test, data.classes, splits={"unlabeled": unlabeled})


@register("trainers", "two-streams", paper="", takes=("image",), sends="weights")
class TwoStreams(Trainer):
    """A labeled and an unlabeled batch in every step."""

    class Config(TrainerConfig):
        pass

    def batches(self, split, turn):
        for batch in super().batches(split, turn):
            index = torch.randint(len(self.unlabeled), (len(batch),), generator=turn.generator)
            other = self.unlabeled.batch(index)
            yield Batch({**batch.fields, "u": other.x}, batch.index)

    def fit(self, model, data, state, turn):
        self.unlabeled = data.splits["unlabeled"]
        return super().fit(model, data, state, turn)

    def loss(self, model, batch, turn):
        probabilities = model(batch.fields["u"]).softmax(1)
        entropy = -(probabilities * (probabilities + 1e-8).log()).sum(1).mean()
        return super().loss(model, batch, turn) + 0.1 * (1 - turn.progress) * entropy


@register("trainers", "pi", paper="", takes=("none",), sends="weights")
class Pi(Trainer):
    """A numerical experiment with no data at all, replies that are no weights, and a metric of its own."""

    class Config(TrainerConfig):
        throws: int = 20000

    metric = ("error", "min")

    def build(self):
        model = nn.Module()
        model.register_buffer("estimate", torch.zeros(1))
        return model

    def fit(self, model, data, state, turn):
        points = torch.rand(self.config.throws, 2, generator=turn.generator)
        model.estimate.fill_(4 * (points.square().sum(1) < 1).float().mean())
        return {"loss": float((model.estimate - torch.pi).abs())}

    def evaluate(self, model, split, turn, batch_size=256):
        error = float((model.estimate - torch.pi).abs())
        return {"loss": error, "error": error}
'''
)

SCENARIO = """\
name: width
data: {data}
clients: 4
partition: {{name: iid}}
model: {{name: mlp, hidden: [16]}}
trainer: {{name: "methods.py:{method}"}}
rounds: {{count: 3}}
runtime: {{grid: local}}
"""


@pytest.fixture
def width(tmp_path):
    (tmp_path / "methods.py").write_text(METHODS)

    def go(method: str, data: str = "digits", *overrides: str):
        current, outcome = run(tmp_path, overrides, SCENARIO.format(method=method, data=data))
        assert not outcome.failed, outcome.failed
        assert all(not line["failures"] for line in lines(current))
        return current

    return go


@pytest.mark.parametrize(
    ("method", "data"),
    [("Partial", "digits"), ("Memory", "digits"), ("TwoModels", "digits"), ("TwoStreams", "methods.py:WithUnlabeled")],
)
def test_the_contract_holds(tmp_path, method, data):
    (tmp_path / "methods.py").write_text(METHODS)
    path = tmp_path / "width.yaml"
    path.write_text(SCENARIO.format(method=method, data=f'"{data}"'))
    contract.check(path)


def test_partial_sending(width):
    current = width("Partial")
    sent = load_file(current.path / "cells/main-seed0/model.safetensors")
    assert set(sent) == {"head.weight", "head.bias"}
    line = lines(current)[1]
    assert line["bytes_up"] < 4 * (sum(v.nbytes for v in sent.values()) + 500)
    assert lines(current)[-1]["central"]["loss"] < lines(current)[0]["central"]["loss"]


def test_private_memory_lives_across_rounds(width):
    rows = [r for r in lines(width("Memory"), "clients.jsonl") if r["phase"] == "train"]
    assert [r["metrics"]["least_seen"] for r in rows if r["client"] == 2] == [1, 2, 3]
    assert [r["metrics"]["rounds"] for r in rows if r["client"] == 2] == [1, 2, 3]


def test_several_models_and_two_streams(width):
    for method, data in (("TwoModels", "digits"), ("TwoStreams", '"methods.py:WithUnlabeled"')):
        current = width(method, data)
        assert lines(current)[-1]["central"]["loss"] < lines(current)[0]["central"]["loss"]


def test_no_data_at_all(width):
    current = width("Pi", "none")
    assert lines(current)[-1]["central"]["error"] < 0.05
    assert lines(current)[-1]["federated"]["error"] < 0.05
    assert (current.path / "report.html").parent.is_dir()
