"""CLIP-Lite: its loss, critic and optimizer against independent ones, and the captioned digits."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytorch_optimizer import Lookahead
from torch import nn
from torch.nn import functional as F

from federations import lines, run
from trellis import experiment, registry, scenario
from trellis.data.base import ClientData, Split
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


class Indices(nn.Module):
    """An image encoder that only says which image it is."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), 1)


class OneHot(nn.Module):
    """A text encoder that only says which caption it is."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.one_hot(tokens[:, 0], 4).double()


class TableCritic(nn.Module):
    """A critic with a free score for every image and caption."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def sides(self, f: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table[f[:, 0].long()], g

    def text(self, g: torch.Tensor) -> torch.Tensor:
        return g


class Linear(nn.Module):
    """A discriminator with the logit ``at_zero`` - the features' sum."""

    def __init__(self, at_zero: float) -> None:
        super().__init__()
        self.at_zero = at_zero

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.at_zero - x.sum(1, keepdim=True)


def tabled(table: torch.Tensor, **priors: nn.Module) -> clip_lite.ClipLiteModel:
    return clip_lite.ClipLiteModel(Indices(), OneHot(), TableCritic(table), nn.ModuleDict(priors))


def pairs(images: list[int], captions: list[int]) -> Split:
    """Return pairs of images and captions that are numbers; the label is the caption's half."""
    tokens = torch.tensor(captions).unsqueeze(1)
    return Split.whole(x=torch.tensor(images).double(), tokens=tokens, y=tokens[:, 0] // 2)


def plain_trainer(*overrides: str) -> clip_lite.ClipLite:
    return site_of(FILE, [*SMALL, *overrides]).trainer


def test_the_best_critic_is_the_log_ratio_and_the_bound_is_the_divergence():
    """On a 2x2 joint distribution a free table T ends at log p(x,y) / p(x)p(y), and the loss at 2 log 2 - 2 JSD.

    The ten pairs stand in the joint's proportions, and each image with the next caption in those of the product.
    """
    joint = torch.tensor([[0.4, 0.1], [0.2, 0.3]], dtype=torch.float64)
    product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    split = pairs([1, 1, 0, 1, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1, 0, 0, 1, 0])
    batch = split.batch(torch.arange(10))
    image, caption = batch.x.long(), batch.fields["tokens"][:, 0]
    for wanted, captions in ((joint, caption), (product, caption.roll(-1))):
        assert (10 * wanted).long().flatten().tolist() == torch.bincount(2 * image + captions, minlength=4).tolist()
    trainer, model = plain_trainer("trainer.prior=none"), tabled(torch.zeros(2, 4, dtype=torch.float64))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = trainer.loss(model, batch, turn())
        value.backward()
        return value

    optimizer.step(closure)
    table = model.critic.table.detach()[:, :2]
    torch.testing.assert_close(table, (joint / product).log(), atol=1e-6, rtol=0)
    middle = (joint + product) / 2
    jsd = ((joint * (joint / middle).log()).sum() + (product * (product / middle).log()).sum()) / 2
    loss = float(trainer.loss(model, batch, turn()).detach())
    assert 2 * math.log(2) - loss == pytest.approx(2 * float(jsd), abs=1e-9)


@pytest.mark.parametrize("objective", ["jensen-shannon", "clip"])
@pytest.mark.parametrize("text_prior", [False, True])
def test_the_loss_in_numbers(objective, text_prior):
    """An image's negative is the next pair's caption; priors push noise towards 1 and features towards 0."""
    rows = [[0.5, -1.0, 2.0], [0.3, 1.5, -0.7], [-2.0, 0.1, 0.9]]
    table = torch.tensor([[*row, 9.0] for row in rows], dtype=torch.float64)
    trainer = plain_trainer(f"trainer.objective={objective}", "trainer.prior_weight=0.25")
    judges = {"image": Linear(1.0), **({"text": Linear(-0.5)} if text_prior else {})}
    torch.manual_seed(0)
    found = trainer.loss(tabled(table, **judges), pairs([0, 1, 2], [0, 1, 2]).batch(torch.arange(3)), turn())

    def softplus(t: float) -> float:
        return math.log1p(math.exp(t))

    cross = sum(softplus(-rows[n][n]) + softplus(rows[n][(n + 1) % 3]) for n in range(3)) / 3
    if objective == "clip":
        across = [math.log(sum(map(math.exp, row))) for row in (*rows, *zip(*rows, strict=True))]
        cross = (sum(across) - 2 * sum(rows[n][n] for n in range(3))) / 6
    torch.manual_seed(0)
    noise = torch.rand(3, 1, dtype=torch.float64).sum(1).tolist()
    prior = sum(softplus(-(1.0 - u)) + softplus(1.0 - x) for u, x in zip(noise, (0, 1, 2), strict=True)) / 3
    if text_prior:
        noise = torch.rand(3, 4, dtype=torch.float64).sum(1).tolist()
        prior += sum(softplus(0.5 + u) + softplus(-0.5 - 1) for u in noise) / 3  # a one-hot caption's sum is 1
    assert found.item() == pytest.approx(0.75 * cross + 0.25 * prior)


def test_evaluation_in_numbers():
    """Four pairs whose scores are given: signs, guesses by the mean over a class's captions, and the loss."""
    table = torch.tensor(
        [[1.0, -1.0, 4.0, -9.0], [-2.0, -3.0, 1.0, -8.0], [0.5, 0.5, -1.0, 3.0], [2.0, 0.0, 0.1, 1.0]],
        dtype=torch.float64,
    )
    trainer = plain_trainer()
    facts = {**trainer.task.facts, "class_tokens": torch.tensor([[[0], [1]], [[2], [3]]])}
    trainer = clip_lite.ClipLite(trainer.config, replace(trainer.task, facts=facts))
    split = pairs([0, 1, 2, 3], [0, 1, 2, 3])
    found = trainer.evaluate(tabled(table), split, turn(), batch_size=3)
    positive, negative = [1.0, -3.0, -1.0, 1.0], [-1.0, 1.0, 3.0, 2.0]
    loss = sum(math.log1p(math.exp(-p)) + math.log1p(math.exp(n)) for p, n in zip(positive, negative, strict=True)) / 4
    assert found["loss"] == pytest.approx(loss)
    assert found["pair-accuracy"] == (2 / 4 + 1 / 4) / 2
    # mean scores of the two classes: 0, -2.5; -2.5, -3.5; 0.5, 1; 1, 0.55; the labels are 0, 0, 1, 1
    assert found["accuracy"] == 3 / 4


def test_a_lone_test_pair_takes_its_negative_from_training():
    trainer = plain_trainer()
    facts = {**trainer.task.facts, "class_tokens": torch.tensor([[[0], [1]], [[2], [3]]])}
    trainer = clip_lite.ClipLite(trainer.config, replace(trainer.task, facts=facts))
    model, one = tabled(torch.tensor([[2.0, -1.0, 0.0, -5.0]], dtype=torch.float64)), pairs([0], [0])
    own = turn()
    own.data = ClientData(0, train=pairs([0, 0], [1, 0]), test=one)
    found = trainer.evaluate(model, one, own)
    assert found["loss"] == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)))
    assert (found["pair-accuracy"], found["accuracy"]) == (1.0, 1.0)
    with pytest.raises(DataError, match="one pair has no negative"):
        trainer.evaluate(model, one, turn())


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


@pytest.mark.parametrize("text_prior", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_the_priors_weight(weight, text_prior):
    """w = 0 leaves no discriminator; w = 1 leaves the critic, and without its prior the text, without a gradient."""
    site = site_of(FILE, [*SMALL, f"trainer.prior_weight={weight}", f"trainer.text_prior={str(text_prior).lower()}"])
    batch = site.federation.data.train.batch(torch.arange(16))
    site.trainer.loss(site.model.train(), batch, turn()).backward()
    wanted = {"image", "text"} if text_prior else {"image"}
    assert set(site.model.priors) == (wanted if weight else set())

    def moved(part: nn.Module) -> bool:
        return any(p.grad is not None and bool((p.grad != 0).any()) for p in part.parameters())

    assert moved(site.model.critic) == (weight < 1)
    assert moved(site.model.text) == (weight < 1 or text_prior)
    assert moved(site.model.image)


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


@pytest.mark.parametrize(("rounds", "steps", "warm_up"), [(4, 5, 0.1), (20, 20, 0.05), (3, 4, 0.0), (1, 1, 0.05)])
def test_rates_follow_the_authors_schedule_step_by_step(rounds, steps, warm_up):
    """LinearWarmupCosineAnnealingLR of the authors' optim/lr_scheduler.py, over the steps of all rounds."""
    trainer = plain_trainer(f"trainer.local_steps={steps}", f"trainer.warm_up={warm_up}")
    total = rounds * steps
    warm = round(warm_up * total)

    def multiplier(step: int) -> float:
        if step < warm:
            return step / float(max(1, warm))
        return math.cos((step - warm) / (total - warm) * (math.pi / 2)) ** 2

    wanted = [multiplier(step) for step in range(total)]
    shares = [trainer.share(turn(n, rounds), taken) for n in range(1, rounds + 1) for taken in range(steps)]
    assert shares == pytest.approx(wanted)
    assert (shares[0] == 0) == (warm > 0)


def test_every_step_has_its_own_rates(monkeypatch):
    """As the optimizer takes them in a federation of few rounds: up in the first of them, then down."""
    site = site_of(FILE, [*SMALL, "trainer.lr=0.3", "trainer.rest_lr=0.1", "trainer.warm_up=0.25"])
    used, step = [], torch.optim.SGD.step

    def spied(self, closure=None):
        used.append([group["lr"] for group in self.param_groups])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", spied)
    for number in (1, 2):
        site.trainer.fit(site.model, site.federation.client(0), {}, turn(number, 2))
    shares = [0, 1 / 3, 2 / 3, *(math.cos(n / 9 * math.pi / 2) ** 2 for n in range(9))]
    assert [image for image, _ in used] == pytest.approx([0.3 * share for share in shares])
    assert [rest for _, rest in used] == pytest.approx([0.1 * share for share in shares])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("batch_norm=recalibrate", r"trainer\.batch_norm: Input should be 'average' or 'local' \(got 'recalibrate'\)"),
        ("drop_last=true", r"trainer\.drop_last: Input should be False \(got True\)"),
        ("local_epochs=2", r"trainer\.local_epochs: Input should be 1 \(got 2\)"),
    ],
)
def test_options_that_would_do_nothing_are_refused(change, message):
    with pytest.raises(ScenarioError, match=message):
        scenario.check(scenario.load(FILE, ["variants={}", f"trainer.{change}"]))


@pytest.mark.parametrize("policy", ["average", "local"])
def test_clients_evaluate_under_every_policy_of_batch_norm(tmp_path, policy):
    current, outcome = run(tmp_path, (f"trainer.batch_norm={policy}", "rounds.count=1"), TEXT)
    assert not outcome.failed, outcome.failed
    assert set(lines(current)[-1]["federated"]) >= {"loss", "accuracy", "pair-accuracy"}


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
