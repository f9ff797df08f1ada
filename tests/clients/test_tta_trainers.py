"""The forward-only trainers: adapters on a device's model, what stays on the client, and what new weights drop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trellis.data.base import Batch
from trellis.errors import DataError
from trellis_clients import client_state
from trellis_clients.contract import site_of
from trellis_clients.edge import adapters
from trellis_clients.torch_predictor import TorchPredictor
from trellis_clients.trainer import Turn
from trellis_clients.trainers.cloud_edge import _forward_only

SCENARIO = """\
name: forward-only
data: {name: digits}
clients: 2
partition: {name: iid, test_fraction: 0.5}
model: {name: small-cnn, width: 4, hidden: 16, norm: batch}
trainer: {name: TRAINER, stream: {severity: 3.0, segment: 2, batch_size: 16}}
strategy: {name: cema, batches: 2}
runtime: {grid: local}
"""
VIT = ("model={name: vit, patch: 4, dim: 8, depth: 2, heads: 2}", "trainer.prompts=1")
CASES = {
    "tta-bn": (),
    "tta-bn moving": ("trainer.moving=true", "trainer.prior=16.0"),
    "tta-t3a": ("trainer.supports=null",),
    "tta-lame": (),
    "tta-foa": VIT,
    "tta-foa shift only": ("trainer.prompts=0",),
}
KEEPING = [case for case in CASES if case not in ("tta-bn", "tta-lame")]


def site(folder, trainer: str, *overrides: str):
    path = folder / "forward.yaml"
    path.write_text(SCENARIO.replace("TRAINER", trainer.split()[0]))
    return site_of(path, overrides)


def turn(here, number: int = 1, batches: int = 2, client: int = 0) -> Turn:
    arrays = {name: values.detach().clone() for name, values in here.trainer.shared(here.model).items()}
    source = {name: values.clone() for name, values in here.model.state_dict().items()}
    received = {"arrays": arrays, "source": source}
    return Turn(number, 10, client, 2, torch.Generator(), {"batches": batches}, received)


def go(here, state, number: int = 1, batches: int = 2, client: int = 0):
    each = turn(here, number, batches, client)
    return here.trainer.answer("stream", here.model, here.federation.client(client), state, each), each


def stored(state):
    """Return a client's state as it comes back from a checkpoint."""
    return client_state.unpack(client_state.pack(state))


def same(a, b) -> bool:
    a, b = a["adapter"], b["adapter"]
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("case", CASES)
def test_a_stream_in_two_turns_is_the_stream_in_one_with_another_client_in_between(tmp_path, case):
    here, whole, parts, other = site(tmp_path, case, *CASES[case]), {}, {}, {}
    start = {name: values.clone() for name, values in here.model.state_dict().items()}
    once, _ = go(here, whole, batches=4)
    right = 0
    for number in (1, 2):
        metrics, each = go(here, parts, number)
        right += metrics["right"]
        assert len(each.reply["uploads"]["images"]) == metrics["uploaded"] == metrics["backwards"] == 0
        assert set(each.reply) == {"uploads"}
        go(here, other, number, client=1)
        parts = stored(parts)
    assert once["right"] == right and once["seen"] == 64
    assert same(parts, whole)
    for name, values in here.model.state_dict().items():
        assert torch.equal(values, start[name]), name


@pytest.mark.parametrize("case", CASES)
def test_a_trainers_answers_are_its_adapters(tmp_path, case):
    here, state = site(tmp_path, case, *CASES[case]), {}
    data, trainer = here.federation.client(0), here.trainer
    predictor = TorchPredictor(here.model, here.trainer.task.classes, here.trainer.task.shape)
    if "moving" in case:
        predictor = _forward_only.StreamPredictor(here.model, here.trainer.task.classes, here.trainer.task.shape)
    adapter = adapters.create(trainer.adapter, predictor, **trainer.options(0))
    if adapter.needs_source:
        adapter.prepare(data.train.batch(torch.arange(32)).x.numpy())
    stream = [trainer.stream(data).batch(position)[0] for position in range(3)]
    trainer.prepare(here.model, data, state, turn(here))
    batches = (Batch({"x": x}, torch.arange(len(x))) for x in stream)
    for logits, x in zip(trainer.adapt(here.model, batches, state, turn(here)), stream, strict=True):
        assert np.array_equal(logits.numpy(), adapter.predict(x.numpy()))


@pytest.mark.parametrize("case", KEEPING)
def test_new_global_weights_drop_what_described_the_old_ones(tmp_path, case):
    here, kept = site(tmp_path, case, *CASES[case]), {}
    go(here, kept)
    with torch.no_grad():
        next(iter(here.trainer.shared(here.model).values())).mul_(1.5)
    fresh, moved = {"position": kept["position"]}, stored(kept)
    go(here, fresh, 2)
    metrics, _ = go(here, moved, 2)
    assert same(fresh, moved)
    assert metrics["seen"] == 32
    # The same weights, sent again, drop nothing.
    longer = stored(moved)
    go(here, longer, 3)
    fresh = {"position": moved["position"]}
    go(here, fresh, 3)
    assert not same(fresh, longer)


def test_foas_source_is_the_clients_own_clean_images_and_its_draws_the_clients_own(tmp_path):
    here = site(tmp_path, "tta-foa", *VIT)
    states = [{}, {}]
    for client, state in enumerate(states):
        go(here, state, client=client)
        clean = here.federation.client(client).train.batch(torch.arange(32)).x
        with torch.no_grad():
            expected = here.model.features(clean).mean(0)
        np.testing.assert_allclose(state["adapter"]["source.feature"], expected, rtol=1e-4, atol=1e-5)
    seeds = {here.trainer.options(client)["seed"] for client in (0, 1)}
    again = {site(tmp_path, "tta-foa", *VIT).trainer.options(client)["seed"] for client in (0, 1)}
    assert len(seeds) == 2 and seeds == again


def test_forwards_are_counted(tmp_path):
    metrics, _ = go(site(tmp_path, "tta-foa", *VIT, "trainer.population=5"), {})
    assert metrics["forwards"] == 6 * 32
    assert metrics["fitness"] <= metrics["carried-fitness"]
    metrics, _ = go(site(tmp_path, "tta-t3a"), {})
    assert metrics["forwards"] == 32


@pytest.mark.parametrize(
    ("trainer", "overrides", "code"),
    [
        ("tta-foa", (), "adapter-prompts"),
        ("tta-bn", VIT[:1], "adapter-batch-norm"),
        ("tta-bn", ("model.norm=group",), "adapter-batch-norm"),
        ("tta-bn", ("trainer.prior=null", "trainer.moving=true"), "scenario-invalid"),
        ("tta-lame", ("trainer.affinity=near",), "scenario-invalid"),
        ("tta-t3a", ("trainer.supports=0",), "scenario-invalid"),
        ("tta-t3a", ("trainer.seed=1",), "scenario-invalid"),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(tmp_path, trainer, overrides, code):
    with pytest.raises(Exception) as caught:
        site(tmp_path, trainer, *overrides)
    assert getattr(caught.value, "code", None) == code


def test_too_few_clean_images_are_named(tmp_path):
    here = site(tmp_path, "tta-foa", *VIT)
    data = here.federation.client(0)
    few = type(data)(data.client, data.train.subset(torch.arange(1)), data.test)
    with pytest.raises(DataError, match="at least 2 clean examples"):
        here.trainer.answer("stream", here.model, few, {}, turn(here))
