"""RMT: losses, teacher, prototypes and answers against their closed forms; what a device keeps."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from federations import lines, run
from test_bits import resumed
from trellis.data.base import Batch, ClientData, Split
from trellis.errors import PluginError
from trellis.runs import find, read_lines
from trellis_clients import batchnorm, client_state
from trellis_clients.contract import site_of
from trellis_clients.trainer import Turn
from trellis_clients.trainers.adaptation import rmt
from trellis_clients.trainers.adaptation._views import another_view
from trellis_clients.trainers.adaptation.rmt import RMT, Adapting, contrast, nearest, surprise

SCENARIO = """\
name: rmt
data: digits
clients: 2
partition: {name: iid, test_fraction: 0.5}
model: {name: small-cnn, width: 2, hidden: 12, norm: batch}
trainer: {name: rmt, projector: 6, warmup_images: 64, stream: {severity: 3.0, segment: 2, batch_size: 16}}
strategy: {name: cema, batches: 2, epochs: 1, foundation: {name: small-cnn, width: 2, hidden: 8, norm: batch}}
rounds: {count: 4}
evaluation: {central_every: 0, federated_every: 0}
probe: {every: 0, least: 0}
runtime: {grid: local}
"""
STILL = ("trainer.target_weight=0.0", "trainer.contrast_weight=0.0", "trainer.warmup_images=0")


def site(folder, *overrides: str):
    path = folder / "rmt.yaml"
    path.write_text(SCENARIO)
    return site_of(path, overrides)


def turn_of(here, number: int = 1, batches: int = 2) -> Turn:
    arrays = {name: values.detach().clone() for name, values in here.trainer.shared(here.model).items()}
    source = {name: values.clone() for name, values in here.model.state_dict().items()}
    generator = torch.Generator().manual_seed(number)
    torch.manual_seed(number)  # as the app does for every turn: a new projector is drawn from here
    return Turn(number, 4, 0, 2, generator, {"batches": batches}, {"arrays": arrays, "source": source})


def logits(n: int = 6, classes: int = 4, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


# -- losses -----------------------------------------------------------------------------------------------


def test_symmetric_cross_entropy_of_equal_logits_is_their_entropy_and_swapping_changes_nothing():
    a, b = logits(), logits(seed=1)
    p = a.softmax(1)
    torch.testing.assert_close(surprise(a, a), -(p * p.log()).sum(1))
    torch.testing.assert_close(surprise(a, b), F.cross_entropy(a, b.softmax(1), reduction="none"))
    torch.testing.assert_close(surprise(a, b) + surprise(b, a), surprise(b, a) + surprise(a, b))


def test_both_directions_reach_the_student():
    """d S(o, t)/do = softmax(o) - softmax(t); S(t, o) flows through the student's own probabilities."""
    o, t = logits().requires_grad_(), logits(seed=1)
    (one,) = torch.autograd.grad(surprise(o, t).sum(), o)
    torch.testing.assert_close(one, (o.softmax(1) - t.softmax(1)).detach())
    (other,) = torch.autograd.grad(surprise(t, o).sum(), o)
    p, log = o.softmax(1).detach(), t.log_softmax(1)
    torch.testing.assert_close(other, -p * (log - (p * log).sum(1, keepdim=True)))
    (both,) = torch.autograd.grad((surprise(o, t) + surprise(t, o)).sum(), o)
    torch.testing.assert_close(both, one + other)


def test_the_contrast_is_that_of_three_views_summed_by_hand():
    views = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    z = views.reshape(15, 7).numpy()
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    similar = np.exp(z @ z.T / 0.1)
    losses = []
    for anchor in range(15):
        rest = sum(similar[anchor, other] for other in range(15) if other != anchor)
        positives = [other for other in range(15) if other != anchor and other % 5 == anchor % 5]
        losses.append(-np.mean([np.log(similar[anchor, other] / rest) for other in positives]))
    assert float(contrast(views, 0.1)) == pytest.approx(float(np.mean(losses)), rel=1e-9)
    order = torch.randperm(5)
    assert float(contrast(views[:, order], 0.1)) == pytest.approx(float(np.mean(losses)), rel=1e-9)


def test_the_contrast_of_one_image_with_equal_views_is_the_logarithm_of_two():
    assert float(contrast(torch.ones(3, 1, 4), 0.1)) == pytest.approx(math.log(2))


def test_the_nearest_prototype_is_by_cosine():
    among = torch.tensor([[1.0, 0.0], [0.0, 100.0]])
    found = nearest(torch.tensor([[5.0, 0.1], [0.1, 0.2]]), among)
    assert torch.equal(found, among)


def test_the_objective_is_the_weighted_sum_of_its_parts(tmp_path):
    here = site(tmp_path, "trainer.target_weight=0.7", "trainer.contrast_weight=0.3", "trainer.source_weight=0.5")
    trainer, data = here.trainer, here.federation.client(0)
    trainer.lens, trainer.replay = trainer.stream(data), data.train
    own = Adapting(trainer.config, here.model)
    own.prototypes = rmt.prototypes(here.model, data.train, 10)
    x, turn = trainer.lens.batch(0)[0], turn_of(here)
    with batchnorm.batch_statistics(own.student), batchnorm.batch_statistics(own.teacher):
        z = own.student.features(x)
        o, t = own.student.head(z), own.teacher(x) + 0.5
        loss = trainer.objective(own, x, z, o, t, turn)
        generator = turn_of(here).generator
        view = trainer.lens.to_inputs(another_view(trainer.lens.to_pixels(x), generator, False))
        z_view = own.student.features(view)
        o_view = own.student.head(z_view)
        replayed = data.train.batch(torch.randperm(len(data.train), generator=generator)[:16])
        source = F.cross_entropy(own.student(replayed.x), replayed.y)
    pairs = [(o, t), (t, o), (o_view, t), (t, o_view)]
    symmetric = sum(0.25 * F.cross_entropy(a, b.softmax(1)) for a, b in pairs)
    closest = own.prototypes[F.cosine_similarity(z[:, None], own.prototypes[None], dim=2).argmax(1)]
    pulled = contrast(torch.stack([own.projector(v) for v in (closest, z, z_view)]), 0.1)
    torch.testing.assert_close(loss, 0.7 * symmetric + 0.3 * pulled + 0.5 * source)


# -- teacher and prototypes -------------------------------------------------------------------------------


def test_the_teacher_follows_by_powers_of_its_momentum_and_has_no_gradient(tmp_path):
    here = site(tmp_path, "trainer.teacher_momentum=0.9")
    own = Adapting(here.trainer.config, here.model)
    start = [values.clone() for values in own.teacher.parameters()]
    for group in own.optimizer.param_groups:
        group["lr"] = 0.0
    with torch.no_grad():
        for values in own.student.parameters():
            values += 1
    x = here.federation.client(0).train.batch(torch.arange(8)).x
    for _ in range(5):
        own.step(own.student(x).square().mean())
    for before, after, student in zip(start, own.teacher.parameters(), own.student.parameters(), strict=True):
        torch.testing.assert_close(after, 0.9**5 * before + (1 - 0.9**5) * student)
        assert after.grad is None and not after.requires_grad


def test_prototypes_are_class_means_and_absent_classes_have_none(tmp_path):
    here = site(tmp_path)
    train = here.federation.client(0).train
    y = train.batch(torch.arange(len(train))).y
    some = train.subset((y != 3).nonzero()[:, 0])
    found = rmt.prototypes(here.model, some, 10)
    assert found.shape == (9, 12) and bool(torch.isfinite(found).all())
    batch = some.batch(torch.arange(len(some)))
    with torch.no_grad(), batchnorm.batch_statistics(here.model.eval()):
        z = torch.cat([here.model.features(part) for part in batch.x.split(256)])
    for row, label in zip(found, [0, 1, 2, 4, 5, 6, 7, 8, 9], strict=True):
        torch.testing.assert_close(row, z[batch.y == label].mean(0))


# -- a device ---------------------------------------------------------------------------------------------


def go(here, state, number: int = 1, batches: int = 2):
    data = here.federation.client(0)
    return here.trainer.answer("stream", here.model, data, state, turn_of(here, number, batches))


def test_with_all_weights_zero_nothing_moves_and_answers_are_twice_the_source(tmp_path):
    here, state = site(tmp_path, *STILL), {}
    source = copy.deepcopy(here.model).eval()
    data, turn = here.federation.client(0), turn_of(here)
    here.trainer.prepare(here.model, data, state, turn)
    x = here.trainer.stream(data).batch(0)[0]
    (answer,) = here.trainer.adapt(here.model, [Batch({"x": x}, torch.arange(16))], state, turn)
    with torch.no_grad(), batchnorm.batch_statistics(source):
        torch.testing.assert_close(answer, 2 * source(x))
    for name, values in source.state_dict().items():
        assert torch.equal(state[RMT]["student"][name], values), name


def test_a_batch_is_answered_before_it_is_learnt_from(tmp_path):
    here, state = site(tmp_path), {}
    data, turn = here.federation.client(0), turn_of(here)
    here.trainer.prepare(here.model, data, state, turn)
    begun = Adapting(here.trainer.config, here.model, client_state.unpack(client_state.pack(state))[RMT])
    x = here.trainer.stream(data).batch(0)[0]
    (answer,) = here.trainer.adapt(here.model, [Batch({"x": x}, torch.arange(16))], state, turn)
    with torch.no_grad(), batchnorm.batch_statistics(begun.student), batchnorm.batch_statistics(begun.teacher):
        torch.testing.assert_close(answer, begun.student(x) + begun.teacher(x))
    moved = [n for n, v in begun.student.named_parameters() if not torch.equal(v, state[RMT]["student"][n])]
    assert len(moved) == len(list(begun.student.parameters()))


def test_prototypes_and_running_statistics_stay_as_they_came(tmp_path):
    here, state = site(tmp_path), {}
    go(here, state)
    first = {name: values.clone() for name, values in state[RMT]["student"].items()}
    fixed = state[RMT]["prototypes"].clone()
    source = state["source"]
    go(here, state, 2)
    assert torch.equal(state[RMT]["prototypes"], fixed)
    assert not torch.equal(state[RMT]["student"]["head.weight"], first["head.weight"])
    for name in batchnorm.private_names(here.model, "recalibrate"):
        assert torch.equal(state[RMT]["student"][name], source[name]), name


def test_the_warm_up_and_the_stream_read_no_labels_without_replay(tmp_path):
    """Labels make the prototypes; nothing else of the source, and nothing of the stream, is learnt from."""
    kept = []
    for wrong in (False, True):
        here, state = site(tmp_path), {}
        data, turn = here.federation.client(0), turn_of(here)
        here.trainer.prepare(here.model, data, state, turn)
        if wrong:
            fields = {**data.train.fields, "y": torch.full_like(data.train.fields["y"], 10**6)}
            data = ClientData(0, Split(fields, data.train.rows), Split(fields, data.test.rows), data.splits)
        here.trainer.answer("stream", here.model, data, state, turn)
        kept.append(state[RMT]["student"])
    assert all(torch.equal(values, kept[1][name]) for name, values in kept[0].items())


def test_another_clients_turn_leaves_no_trace(tmp_path):
    here, alone, mixed = site(tmp_path), {}, {}
    for number in (1, 2):
        go(here, alone, number)
    there, other = site(tmp_path), {}
    go(there, mixed, 1)
    message = turn_of(here)
    source = turn_of(site(tmp_path)).received
    there.trainer.answer(
        "stream", there.model, there.federation.client(1), other, replace(message, client=1, received=source)
    )
    second = replace(turn_of(here, 2), received=source)
    there.trainer.answer("stream", there.model, there.federation.client(0), mixed, second)
    assert torch.equal(alone[RMT]["student"]["head.weight"], mixed[RMT]["student"]["head.weight"])


def test_views_keep_their_form_and_follow_the_generator():
    x = torch.rand(5, 3, 8, 8)
    one, two = (another_view(x, torch.Generator().manual_seed(4), flip=True) for _ in range(2))
    assert torch.equal(one, two) and one.shape == x.shape and 0 <= float(one.min()) <= float(one.max()) <= 1
    assert not torch.equal(one, another_view(x, torch.Generator().manual_seed(5), flip=True))
    flat = torch.full((4, 1, 8, 8), 0.5)
    assert float((another_view(flat, torch.Generator(), False) - 0.5).abs().max()) < 0.25  # no edges come from nowhere


def test_a_run_answers_uploads_nothing_and_resumes_to_the_same_bits(tmp_path):
    text = SCENARIO.replace("projector: 6", "projector: 6, source_weight: 0.5")
    whole, outcome = run(tmp_path, text=text)
    assert not outcome.failed, outcome.failed
    assert all(row["train"]["uploaded"] == 0 for row in lines(whole)[1:])
    (tmp_path / "broken").mkdir()
    assert resumed(tmp_path / "broken", text) == outcome.summaries[0]["sha256"]
    again = read_lines(find(tmp_path / "broken" / "runs")[0] / "cells/main-seed0/metrics.jsonl")
    # No array of the strategy's changes here; what a device has become shows in its answers.
    assert [row["train"] for row in again] == [row["train"] for row in lines(whole)]
    last = [row["metrics"] for row in lines(whole, "clients.jsonl") if row["round"] == 4]
    assert [0 <= each["clean-accuracy"] <= 1 for each in last] == [True, True]


def test_a_resumed_stream_gives_the_same_answers(tmp_path):
    """The strategy's arrays never change here, so the bits that count are the client's answers and state."""
    straight, broken = ({}, {})
    here, there = site(tmp_path), site(tmp_path)
    first, again = turn_of(here), turn_of(site(tmp_path))
    figures = []
    for number in (1, 2, 3):
        figures.append(
            here.trainer.answer("stream", here.model, here.federation.client(0), straight, numbered(first, number))
        )
    for number in (1, 2, 3):
        found = there.trainer.answer("stream", there.model, there.federation.client(0), broken, numbered(again, number))
        assert found == figures[number - 1]
        broken, there = client_state.unpack(client_state.pack(broken)), site(tmp_path)  # another process
    for name, part in itertools.product(straight[RMT]["student"], ("student", "teacher")):
        assert torch.equal(straight[RMT][part][name], broken[RMT][part][name]), (part, name)


def numbered(turn: Turn, number: int) -> Turn:
    torch.manual_seed(number)
    return replace(turn, round=number, generator=torch.Generator().manual_seed(number))


def test_a_model_without_features_is_said(tmp_path):
    here = site(tmp_path)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10))
    here.trainer.task = replace(here.trainer.task, model=lambda: model)
    with pytest.raises(PluginError, match=r"Sequential has no features\(x\)"):
        here.trainer.build()
