"""CLIP-Lite: its loss, critic and optimizer against independent ones, and the captioned digits."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from pytorch_optimizer import Lookahead
from torch import nn
from torch.nn import functional as F

from federations import run
from trellis import experiment, registry, scenario
from trellis.data.sets import captioned_digits
from trellis.errors import DataError, ScenarioError
from trellis.runs import Run
from trellis_clients import contract
from trellis_clients.contract import site_of
from trellis_clients.trainer import Turn
from trellis_clients.trainers.image_text import _critic, clip_lite

FILE = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "clip-lite.yaml"
SMALL = ["variants={}", "trainer.local_steps=6", "model={name: small-cnn, norm: batch, width: 2, hidden: 8}"]
TEXT = """\
name: pairs
data: captioned-digits
clients: 2
model: {name: small-cnn, norm: batch, width: 2, hidden: 8}
trainer: {name: clip-lite, local_steps: 4, batch_norm: local}
rounds: {count: 3}
probe: {every: 0}
runtime: {grid: local}
"""


def turn(number: int = 1, rounds: int = 10, seed: int = 3) -> Turn:
    return Turn(number, rounds, 0, 2, torch.Generator().manual_seed(seed))


def test_the_loss_is_binary_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    positive, negative = 3 * torch.randn(2, 40, generator=generator)
    wanted = F.binary_cross_entropy_with_logits(positive, torch.ones(40)) + F.binary_cross_entropy_with_logits(
        negative, torch.zeros(40)
    )
    torch.testing.assert_close(_critic.jensen_shannon(positive, negative), wanted)
    assert float(_critic.jensen_shannon(torch.zeros(5), torch.zeros(5))) == pytest.approx(2 * math.log(2))


def test_the_best_critic_is_the_log_ratio_and_the_bound_is_the_divergence():
    """On a 2x2 joint distribution a free table T ends at log p(x,y) / p(x)p(y), and the loss at 2 log 2 - 2 JSD."""
    joint = torch.tensor([[0.4, 0.1], [0.2, 0.3]], dtype=torch.float64)
    product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    table = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def loss() -> torch.Tensor:
        return (joint * F.softplus(-table)).sum() + (product * F.softplus(table)).sum()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(table.detach(), (joint / product).log(), atol=1e-6, rtol=0)
    middle = (joint + product) / 2
    jsd = ((joint * (joint / middle).log()).sum() + (product * (product / middle).log()).sum()) / 2
    assert 2 * math.log(2) - loss().item() == pytest.approx(2 * float(jsd), abs=1e-9)


@pytest.mark.parametrize("count", [2, 3, 16])
def test_nobody_is_its_own_negative(count):
    rows = torch.arange(count)
    assert not bool((_critic.rolled(rows) == rows).any())
    assert sorted(_critic.rolled(rows).tolist()) == rows.tolist()


def test_one_pair_has_no_negative():
    with pytest.raises(DataError) as caught:
        _critic.rolled(torch.zeros(1, 3))
    assert caught.value.code == "pairs-single"


def test_clips_loss_is_two_cross_entropies():
    a, b = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1)).unbind(0)
    p, q = (a @ b.T).softmax(1), (b @ a.T).softmax(1)
    wanted = -(p.diagonal().log().mean() + q.diagonal().log().mean()) / 2
    torch.testing.assert_close(_critic.info_nce(a, b), wanted)


def test_the_critic():
    torch.manual_seed(0)
    critic = _critic.DotCritic(6, 4, 8)
    f, g = torch.randn(9, 6), torch.randn(9, 4)
    a, b = critic.sides(f, g)
    scores = a @ b.T
    assert critic.log_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert float(scores.detach().abs().max()) <= critic.log_scale.exp().item() * (1 + 1e-5)
    side = critic.image
    nn.init.zeros_(side.mlp[-1].weight)
    nn.init.zeros_(side.mlp[-1].bias)
    nn.init.zeros_(side.shortcut.bias)
    side.norm = nn.Identity()
    copied = side(f).detach()
    assert bool(((copied[:, :6] - f).abs() <= 0.01 * f.abs().sum(1, keepdim=True) + 1e-6).all())
    with pytest.raises(ScenarioError, match="units is 3"):
        _critic.DotCritic(6, 3, 3)


def test_no_matrix_of_pairs_is_made():
    """What the loss keeps of the critic's scores grows with the batch, not with its square."""
    kept = {}
    for objective in ("jensen-shannon", "clip"):
        site = site_of(FILE, [*SMALL, f"trainer.objective={objective}", "trainer.prior=none"])
        batch = site.federation.data.train.batch(torch.arange(300))
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=shapes: s.append(tuple(x.shape)) or x, lambda x: x):
            site.trainer.loss(site.model.train(), batch, turn())
        kept[objective] = (300, 300) in shapes
    assert kept == {"jensen-shannon": False, "clip": True}


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_the_priors_weight(weight):
    """w = 0 leaves no discriminator; w = 1 leaves critic and text encoder without a gradient."""
    site = site_of(FILE, [*SMALL, f"trainer.prior_weight={weight}"])
    batch = site.federation.data.train.batch(torch.arange(16))
    site.trainer.loss(site.model.train(), batch, turn()).backward()
    assert (site.model.prior is None) == (weight == 0)
    for part in (site.model.critic, site.model.text):
        moved = any(p.grad is not None and bool((p.grad != 0).any()) for p in part.parameters())
        assert moved == (weight < 1)


def test_the_adversarial_prior_turns_the_encoders_gradient_around_and_nothing_else():
    torch.manual_seed(0)
    judge = clip_lite.discriminator(5)
    features = torch.randn(8, 5, requires_grad=True)
    found = []
    for adversarial in (False, True):
        torch.manual_seed(1)
        loss = clip_lite.prior(judge, features, adversarial)
        found.append((loss.detach(), *torch.autograd.grad(loss, [features, *judge.parameters()])))
    (plain, towards, *own), (same, away, *others) = found
    torch.testing.assert_close(plain, same)
    torch.testing.assert_close(towards, -away)
    for one, other in zip(own, others, strict=True):
        torch.testing.assert_close(one, other)


def test_lookahead_is_the_librarys():
    generator = torch.Generator().manual_seed(0)
    ours = nn.Linear(4, 3)
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    mine = _critic.LookaheadSGD(ours.parameters(), 3, 0.4, **options)
    library = Lookahead(torch.optim.SGD(theirs.parameters(), **options), k=3, alpha=0.4)
    for _ in range(10):
        x = torch.randn(5, 4, generator=generator)
        for model, optimizer in ((ours, mine), (theirs, library)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_a_turn_starts_from_the_clouds_weights_alone():
    """Slow weights of the turn before would draw the client back; the first synchronisation must not."""
    site = site_of(FILE, SMALL)
    site.trainer.fit(site.model, site.federation.client(0), {}, turn(1))
    with torch.no_grad():
        for parameter in site.model.parameters():
            parameter.add_(1.0)
    optimizer = site.trainer.optimizer(site.model, turn(2))
    for slow, fast in zip(optimizer.slow, optimizer.fast, strict=True):
        assert torch.equal(slow, fast)
    assert {id(p) for p in optimizer.fast} == {id(p) for p in site.model.parameters()}
    assert optimizer.state == {}


def test_rates_warm_up_and_fall():
    trainer = site_of(FILE, [*SMALL, "trainer.warm_up=0.2"]).trainer
    rates = [trainer.rate(turn(number, 20)) for number in range(1, 21)]
    assert rates[0] == pytest.approx(0.25)
    assert rates == [*sorted(rates[:4]), *sorted(rates[4:], reverse=True)]
    assert 0 < rates[-1] < 0.01
    groups = trainer.optimizer(site_of(FILE, SMALL).model, turn(4, 20)).param_groups
    assert [group["lr"] for group in groups] == [0.02 * trainer.rate(turn(4, 20))] * 2


def test_steps_do_not_depend_on_the_batch():
    for size in (4, 16):
        site = site_of(FILE, [*SMALL, f"trainer.batch_size={size}"])
        batches = list(site.trainer.batches(site.federation.client(0).train, turn()))
        assert [len(batch) for batch in batches] == [size] * 6
        assert all(len(batch.index.unique()) == size for batch in batches)


def test_captions_say_what_is_in_the_picture(tmp_path):
    cls = registry.load("datasets", "captioned-digits")
    load = lambda seed, **options: cls(cls.Config.model_validate(options), tmp_path).load(seed)  # noqa: E731
    data = load(0, standardize=False)
    words = data.facts["vocabulary"]
    x, y, captions = (data.train.fields[name] for name in ("x", "y", "tokens"))
    assert (data.kind, data.example_shape, len(data.train) + len(data.test)) == ("pairs", (1, 16, 16), 1797)
    for image, label, row in zip(x[:200], y[:200].tolist(), captions[:200].tolist(), strict=True):
        said = [words[token] for token in row if token]
        assert captioned_digits.DIGITS[label] in said
        top, left = float(image[0, :8].sum()) > 0, float(image[0, :, :8].sum()) > 0
        assert ("top" in said, "left" in said) == (top, left)
        assert ("bottom" in said, "right" in said) == (not top, not left)
        bright = bool({"bright", "strong"} & set(said))
        assert bright == (float(image.max()) > 0.5)
        assert bright != bool({"faint", "pale"} & set(said))
    again, other = load(0, standardize=False), load(1, standardize=False)
    assert torch.equal(again.train.fields["tokens"], captions) and torch.equal(again.train.fields["x"], x)
    assert not torch.equal(other.test.fields["tokens"], data.test.fields["tokens"])
    assert torch.equal(other.test.fields["y"], data.test.fields["y"])
    assert data.facts["class_tokens"].shape == (10, 16, 7)
    middle = load(0, places=False, tones=False, standardize=False)
    assert float(middle.train.fields["x"][:, :, 4:12, 4:12].sum()) == float(middle.train.fields["x"].sum())


def test_private_batch_norm_survives_a_restart(tmp_path):
    _, whole = run(tmp_path, (), TEXT)
    assert not whole.failed, whole.failed
    broken = Run.create(tmp_path / "cut", scenario.load(tmp_path / "digits.yaml"))

    class Stop(Exception):
        pass

    def stop(_, line):
        if line["round"] == 2:
            raise Stop

    with pytest.raises(Stop):
        experiment.execute(broken, experiment.Hooks(on_round=stop))
    outcome = experiment.execute(Run.open(broken.path))
    assert outcome.summaries[0]["sha256"] == whole.summaries[0]["sha256"]


def test_batch_norm_of_critic_and_encoder_can_stay_local():
    sent = site_of(FILE, [*SMALL, "trainer.batch_norm=local"]).initial()
    both = site_of(FILE, SMALL).initial()
    kept = set(both) - set(sent)
    assert {name.split(".")[0] for name in kept} == {"image", "critic"}
    assert any("running_mean" in name for name in kept)
    assert "critic.log_scale" in sent and not any("head" in name for name in both)


@pytest.mark.parametrize("objective", ["jensen-shannon", "clip"])
def test_contract(objective):
    contract.check(FILE, [*SMALL, f"trainer.objective={objective}", "trainer.local_steps=20"])
