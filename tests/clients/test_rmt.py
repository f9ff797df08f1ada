"""RMT: losses, teacher, prototypes and answers against their closed forms; what a device keeps."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from federations import lines, run
from test_bits import resumed
from trellis.data.base import Batch, ClientData, Split
from trellis.errors import PluginError, ScenarioError
from trellis.models import torchvision_shim
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


def adapting(here, kept=None) -> Adapting:
    data = here.federation.client(0)
    return Adapting(here.trainer.config, here.model, data.train, here.trainer.stream(data), kept)


def logits(n: int = 6, classes: int = 4, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


# -- losses -----------------------------------------------------------------------------------------------


def test_cross_entropy_of_equal_logits_is_their_entropy():
    a, b = logits(), logits(seed=1)
    p = a.softmax(1)
    torch.testing.assert_close(surprise(a, a), -(p * p.log()).sum(1))
    torch.testing.assert_close(surprise(a, b), F.cross_entropy(a, b.softmax(1), reduction="none"))


@pytest.mark.parametrize("symmetric", [True, False])
def test_swapping_student_and_teacher_leaves_the_symmetric_objective_alone(tmp_path, monkeypatch, symmetric):
    """Where the view is the image itself; the one-sided objective of the plain mean teacher differs."""
    monkeypatch.setattr(rmt, "another_view", lambda pixels, *_: pixels)
    here = site(tmp_path, "trainer.contrast_weight=0.0", f"trainer.symmetric={str(symmetric).lower()}")
    x = here.federation.client(0).train.batch(torch.arange(16)).x
    own = adapting(here)
    with torch.no_grad():
        for values in own.teacher.parameters():
            values += 0.1 * torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    values = []
    for _ in range(2):
        with batchnorm.batch_statistics(own.student), batchnorm.batch_statistics(own.teacher):
            z = own.student.features(x)
            loss = here.trainer.objective(own, x, z, own.student.head(z), own.teacher(x), turn_of(here))
        values.append(float(loss.detach()))
        own.student, own.teacher = own.teacher, own.student
    assert (abs(values[0] - values[1]) < 1e-5 * values[0]) == symmetric


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
    own = adapting(here)
    own.prototypes = rmt.prototypes(here.model, data.train, 10, torch.Generator())
    x, turn = own.lens.batch(0)[0], turn_of(here)
    with batchnorm.batch_statistics(own.student), batchnorm.batch_statistics(own.teacher):
        z = own.student.features(x)
        o, t = own.student.head(z), own.teacher(x) + 0.5
        loss = trainer.objective(own, x, z, o, t, turn)
        generator = turn_of(here).generator
        view = own.lens.to_inputs(another_view(own.lens.to_pixels(x), generator, False))
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
    own = adapting(here)
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
    found = rmt.prototypes(here.model, some, 10, torch.Generator().manual_seed(3))
    assert found.shape == (9, 12) and bool(torch.isfinite(found).all())
    batch = some.batch(torch.randperm(len(some), generator=torch.Generator().manual_seed(3)))
    size = math.ceil(len(some) / 2)  # two even batches of at most 256
    with torch.no_grad(), batchnorm.batch_statistics(here.model.eval()):
        z = torch.cat([here.model.features(part) for part in batch.x.split(size)])
    for row, label in zip(found, [0, 1, 2, 4, 5, 6, 7, 8, 9], strict=True):
        torch.testing.assert_close(row, z[batch.y == label].mean(0))


def by_class(split: Split) -> Split:
    """Return a split as an image folder has it: one class after another."""
    return split.subset(split.fields["y"][split.rows].argsort(stable=True))


@contextmanager
def labels_of_batches(model: nn.Module, split: Split) -> Iterator[list[list[int]]]:
    """Give, batch by batch, the labels of the split's images that go through a model."""
    whole = split.batch(torch.arange(len(split)))
    labels = {x.numpy().tobytes(): int(y) for x, y in zip(whole.x, whole.y, strict=True)}
    found: list[list[int]] = []
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    hook = first.register_forward_pre_hook(
        lambda _, inputs: found.append([labels[x.numpy().tobytes()] for x in inputs[0]])
    )
    yield found
    hook.remove()


def test_prototypes_of_a_source_stored_class_by_class_are_those_of_mixed_batches(tmp_path):
    """A batch of one class normalised by its own statistics would have features that no stream has."""
    here = site(tmp_path)
    source = by_class(here.federation.client(0).train)
    with labels_of_batches(here.model, source) as batches:
        found = rmt.prototypes(here.model, source, 10, torch.Generator().manual_seed(1))
    assert [len(each) for each in batches] == [180, 179]
    assert all(np.bincount(each, minlength=10).min() >= 8 for each in batches)  # of about 18 each
    whole = source.batch(torch.arange(len(source)))
    with torch.no_grad(), batchnorm.batch_statistics(here.model):
        z = here.model.features(whole.x)
    wanted = torch.stack([z[whole.y == label].mean(0) for label in range(10)])
    assert float((found - wanted).norm() / (wanted - wanted.mean(0)).norm()) < 0.1


def test_clean_accuracy_is_of_mixed_batches_and_stands_beside_the_source_models(tmp_path, monkeypatch):
    here, seen = site(tmp_path), []
    data, turn, source = here.federation.client(0), turn_of(here, 4), copy.deepcopy(here.model)
    stored = replace(data, test=by_class(data.test))
    evaluate = here.trainer.evaluate
    monkeypatch.setattr(
        here.trainer, "evaluate", lambda model, split, *_: seen.append(split) or evaluate(model, split, turn)
    )
    metrics = here.trainer.answer("stream", here.model, stored, {}, turn)
    for split in seen:
        assert len(set(split.batch(torch.arange(100)).y.tolist())) == 10
    assert metrics["source-clean-accuracy"] == pytest.approx(evaluate(source, data.test, turn)["accuracy"])
    with batchnorm.batch_statistics(here.model):
        assert metrics["clean-accuracy"] == evaluate(here.model, seen[0], turn)["accuracy"]


def test_eatas_fisher_diagonal_is_of_mixed_batches_too(tmp_path):
    path = tmp_path / "eata.yaml"
    path.write_text(SCENARIO.replace("rmt, projector: 6, warmup_images: 64,", "eata, fisher_images: 64,"))
    here = site_of(path)
    data = here.federation.client(0)
    with labels_of_batches(here.model, data.train) as batches:
        here.trainer.prepare(here.model, replace(data, train=by_class(data.train)), {}, turn_of(here))
    assert [len(each) for each in batches] == [16] * 4
    assert all(len(set(each)) >= 5 for each in batches)


# -- the warm-up ------------------------------------------------------------------------------------------


def test_the_warm_up_by_hand(tmp_path):
    """Three steps of Adam at a third, two thirds and all of the rate, symmetric, the teacher behind; no projector."""
    here = site(tmp_path, "trainer.warmup_images=50", "trainer.teacher_momentum=0.9", "trainer.lr=0.003")
    data, state, turn = here.federation.client(0), {}, turn_of(here)
    # Layers in training mode normalise by the batch as well; the model has no dropout.
    student, teacher = copy.deepcopy(here.model).train(), copy.deepcopy(here.model).train()
    begun = Adapting(here.trainer.config, here.model, data.train, here.trainer.stream(data)).projector.state_dict()
    turn_of(here)  # the projector is drawn anew from the turn's own state
    here.trainer.prepare(here.model, data, state, turn)
    generator = turn_of(here).generator
    torch.randperm(len(data.train), generator=generator)  # the order for the prototypes
    first, second = ({n: torch.zeros_like(v) for n, v in student.named_parameters()} for _ in range(2))
    for step in (1, 2, 3):
        x = data.train.batch(torch.randperm(len(data.train), generator=generator)[:16]).x
        p, q = student(x).softmax(1), teacher(x).softmax(1).detach()
        loss = -(0.5 * q * p.log() + 0.5 * p * q.log()).sum(1).mean()
        gradients = torch.autograd.grad(loss, list(student.parameters()))
        with torch.no_grad():
            for (name, values), gradient in zip(student.named_parameters(), gradients, strict=True):
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                change = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
                values -= 0.003 * step / 3 * change
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.copy_(0.9 * slow + 0.1 * fast)
    for name, model in (("student", student), ("teacher", teacher)):
        for key, values in model.named_parameters():
            torch.testing.assert_close(state[RMT][name][key], values, rtol=0, atol=2e-5, msg=f"{name} {key}")
    moved = max(float((state[RMT]["student"][k] - v).abs().max()) for k, v in here.model.state_dict().items())
    assert moved > 0.003
    assert all(torch.equal(values, begun[name]) for name, values in state[RMT]["projector"].items())
    assert state[RMT]["optimizer"]["param_groups"][0]["lr"] == 0.003  # and so it stays for the stream


def test_the_warm_up_reads_no_labels(tmp_path):
    kept = []
    for wrong in (False, True):
        here, state = site(tmp_path), {}
        data, turn = here.federation.client(0), turn_of(here)
        if wrong:
            y = data.train.fields["y"]
            data = replace(data, train=Split({**data.train.fields, "y": 9 - y}, data.train.rows))
        here.trainer.prepare(here.model, data, state, turn)
        kept.append(state[RMT])
    for part in ("student", "teacher", "projector"):
        assert all(torch.equal(values, kept[1][part][name]) for name, values in kept[0][part].items()), part
    torch.testing.assert_close(kept[0]["prototypes"], kept[1]["prototypes"].flip(0))  # labels make these alone


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
    begun = adapting(here, client_state.unpack(client_state.pack(state))[RMT])
    x = here.trainer.stream(data).batch(0)[0]
    (answer,) = here.trainer.adapt(here.model, [Batch({"x": x}, torch.arange(16))], state, turn)
    with torch.no_grad(), batchnorm.batch_statistics(begun.student), batchnorm.batch_statistics(begun.teacher):
        torch.testing.assert_close(answer, begun.student(x) + begun.teacher(x))
    moved = [n for n, v in begun.student.named_parameters() if not torch.equal(v, state[RMT]["student"][n])]
    assert len(moved) == len(list(begun.student.parameters()))


def test_the_projector_learns_with_the_student_at_its_rate(tmp_path):
    here, state = site(tmp_path, "trainer.lr=0.004", "trainer.weight_decay=0.25", "trainer.warmup_images=0"), {}
    own = adapting(here)
    (group,) = own.optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for m in (own.student, own.projector) for p in m.parameters()}
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.004, (0.9, 0.999), 0.25)
    here.trainer.prepare(here.model, here.federation.client(0), state, turn_of(here))
    begun = {name: values.clone() for name, values in state[RMT]["projector"].items()}
    go(here, state, batches=1)
    for name, values in state[RMT]["projector"].items():
        change = (values - begun[name]).abs()  # Adam's first step is the rate itself, wherever there is a gradient
        assert float(change.max()) == pytest.approx(0.004, rel=0.01), name


@pytest.mark.parametrize("override", ["trainer.momentum=0.9", "trainer.max_grad_norm=1.0"])
def test_what_adam_here_has_no_use_for_is_refused(tmp_path, override):
    with pytest.raises(ScenarioError, match=override.partition("=")[0].partition(".")[2]):
        site(tmp_path, override)


@pytest.mark.parametrize(("weight", "forwards", "backwards"), [(0.0, 3, 2), (0.5, 4, 3)])
def test_replayed_images_count_as_work(tmp_path, weight, forwards, backwards):
    """Teacher, student and view forwards, two of them back; a batch of source images once each way."""
    here = site(tmp_path, f"trainer.source_weight={weight}")
    metrics = go(here, {})
    assert (metrics["forwards"], metrics["backwards"]) == (forwards * 32, backwards * 32)


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


def test_the_stream_reads_no_labels_without_replay(tmp_path):
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
    flat = torch.full((400, 1, 8, 8), 0.5)
    views = another_view(flat, torch.Generator(), False)
    # Brightness 0.6 to 1.4, then gamma 0.7 to 1.3: 0.3 ** 1.3 to 0.7 ** 0.7, give or take the noise.
    assert 0.2 - 0.02 < float(views.min()) < 0.25 and 0.74 < float(views.max()) < 0.78 + 0.02
    assert float(views.std((1, 2, 3)).max()) < 0.01  # no edges come from nowhere


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 16, 16), (3, 16, 16), (3, 16, 24)])
def test_views_are_torchvisions_changes_of_the_same_draws(channels, height, width):
    """The authors' pipeline step by step: colours, padding by half a side, affine map, blur, crop, mirror, noise."""
    assert torchvision_shim.make_importable()
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as theirs

    n, made = 6, torch.Generator().manual_seed(0)
    x = torch.rand(n, channels, height, width, generator=made)
    views = another_view(x, torch.Generator().manual_seed(1), flip=True)
    generator = torch.Generator().manual_seed(1)

    def between(low: float, high: float) -> list[float]:
        return (low + (high - low) * torch.rand(n, generator=generator)).tolist()

    ranges = [(0.6, 1.4), (0.7, 1.3), (0.5, 1.5), (0.7, 1.3), (-15, 15), (0.9, 1.1)]
    ranges += [(-width / 8, width / 8), (-height / 8, height / 8), (0.001, 0.5), (0, 1)]
    draws = list(zip(*[between(*each) for each in ranges], strict=True))
    noise = 0.005 * torch.randn(x.shape, generator=generator)
    for image, view, more, draw in zip(x, views, noise, draws, strict=True):
        brightness, contrast, saturation, gamma, angle, scale, right, down, blur, mirrored = draw
        y = theirs.adjust_contrast(theirs.adjust_brightness(image, brightness), contrast)
        y = theirs.adjust_saturation(y, saturation) if channels == 3 else y
        y = theirs.pad(theirs.adjust_gamma(y.clamp(1e-8, 1), gamma), [width // 2, height // 2], padding_mode="edge")
        y = theirs.affine(y, angle, [round(right), round(down)], scale, [0.0, 0.0], InterpolationMode.BILINEAR)
        y = theirs.center_crop(theirs.gaussian_blur(y, [5, 5], [blur, blur]), [height, width])
        y = theirs.hflip(y) if mirrored < 0.5 else y
        torch.testing.assert_close(view, (y + more).clamp(0, 1), atol=2e-5, rtol=0)


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
    for name in ("clean-accuracy", "source-clean-accuracy"):
        assert [0 <= each[name] <= 1 for each in last] == [True, True]


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
