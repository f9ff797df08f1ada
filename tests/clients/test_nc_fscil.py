"""NC-FSCIL: the simplex, the dot regression, what a client keeps, and what stops travelling."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch.nn import functional as F

from federations import lines, run
from trellis import experiment, flower, records, scenario
from trellis.data.base import Batch
from trellis.errors import DataError, PluginError, ScenarioError
from trellis.runs import Run
from trellis_clients import client_state, contract
from trellis_clients.contract import site_of
from trellis_clients.trainer import Turn
from trellis_clients.trainers.class_incremental import nc_fscil
from trellis_clients.trainers.class_incremental._pieces import Neck, ResNet12, simplex_etf

FILE = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "nc-fscil.yaml"
SMALL = ["variants={}", "trainer.local_epochs=1", "trainer.widths=[4, 8]", "trainer.session_steps=5"]
TEXT = """\
name: fscil
data: digits
clients: 3
trainer: {name: nc-fscil, widths: [4, 8], local_epochs: 1, session_steps: 5, base_rounds: 2, session_rounds: 1}
strategy: partial
rounds: {count: 5}
screening: {max_norm_ratio: null}
evaluation: {federated_every: 2}
probe: {every: 0}
runtime: {grid: local}
"""


def turn_of(site, number: int, client: int = 0, seed: int = 3) -> Turn:
    arrays = {name: values.clone() for name, values in site.trainer.shared(site.model).items()}
    return Turn(number, 10, client, 3, torch.Generator().manual_seed(seed), received={"arrays": arrays})


@pytest.mark.parametrize(("dim", "classes"), [(10, 10), (32, 10), (512, 100)])
def test_the_simplex_is_one(dim, classes):
    etf = simplex_etf(dim, classes, torch.Generator().manual_seed(1)).double()
    wanted = classes / (classes - 1) * torch.eye(classes) - 1 / (classes - 1)
    torch.testing.assert_close(etf.T @ etf, wanted.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(etf.sum(1), torch.zeros(dim).double(), atol=1e-5, rtol=0)


def test_published_numbers_of_weights():
    backbone, neck = ResNet12(3, (64, 160, 320, 640)), Neck(640, 512)
    assert sum(p.numel() for p in backbone.parameters()) == 12_424_320
    assert sum(p.numel() for p in neck.parameters()) == 3_448_320
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 640, 2, 2)


def test_the_dot_regression():
    etf = simplex_etf(8, 5, torch.Generator().manual_seed(0)).T
    assert float(nc_fscil.dot_regression(3 * etf, etf)) == pytest.approx(0, abs=1e-10)
    orthogonal = torch.linalg.svd(etf)[2][-1].expand(5, 8)  # a direction outside the simplex's space
    assert float(nc_fscil.dot_regression(orthogonal, etf)) == pytest.approx(0.5, rel=1e-5)
    h = torch.randn(5, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    loss = nc_fscil.dot_regression(h, etf).detach()
    assert float(loss) == pytest.approx(float(((F.cosine_similarity(h, etf) - 1) ** 2).mean().detach() / 2), rel=1e-6)
    (gradient,) = torch.autograd.grad(nc_fscil.dot_regression(h, etf), h)
    torch.testing.assert_close((gradient * h).sum(1), torch.zeros(5), atol=1e-7, rtol=0)
    lengths = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    by_hand = ((lengths * (F.normalize(h.detach()) * etf).sum(1) - lengths) ** 2).mean() / 2
    assert float(nc_fscil.dot_regression(h.detach(), etf, lengths)) == pytest.approx(float(by_hand), rel=1e-5)


def test_other_classes_places_do_not_enter_the_loss():
    site = site_of(FILE, [*SMALL, "trainer.mix=0.0"])
    batch = site.federation.client(0).train.batch(torch.arange(6))
    losses = []
    for scale in (1.0, 7.0):
        others = [c for c in range(10) if c not in batch.y.tolist()]
        site.model.etf[:, others] *= scale
        losses.append(site.trainer.loss(site.model, batch, turn_of(site, 1)).item())
    assert losses[0] == losses[1]


def test_the_objective_of_round_one_is_w_halves_of_the_squared_gap_to_one():
    site = site_of(FILE, [*SMALL, "trainer.weight=3.0"])
    batch = site.federation.client(0).train.batch(torch.arange(12))
    turn = turn_of(site, 1)
    loss = site.trainer.loss(site.model, batch, turn)
    h = site.model.neck(site.model.backbone(batch.x)).detach().double()
    cosines = torch.stack([h[i] @ site.model.etf[:, y].double() / h[i].norm() for i, y in enumerate(batch.y.tolist())])
    torch.testing.assert_close(loss.double(), 3.0 / 2 * ((cosines - 1) ** 2).mean(), rtol=1e-5, atol=0)
    assert torch.equal(turn.generator.get_state(), turn_of(site, 1).generator.get_state())  # nothing to mix: no draw


@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("mix", [1.0, 0.0])
def test_a_sessions_objective_summed_by_hand(mix, lengths):
    """w/2 of the mean of (l m . mu - l)^2; mixed steps take the mean of two features under both labels."""
    overrides = [f"trainer.mix={mix}", f"trainer.lengths={str(lengths).lower()}", "trainer.weight=3.0"]
    site = site_of(FILE, [*SMALL, *overrides])
    maps = torch.randn(8, 8, 2, 2, generator=torch.Generator().manual_seed(5))
    labels = [0, 6, 6, 6, 7, 7, 3, 0]
    turn = turn_of(site, 7, seed=4)
    loss = site.trainer.loss(site.model, Batch({"maps": maps, "y": torch.tensor(labels)}, torch.arange(8)), turn)
    features = site.model.neck(maps).detach().double()
    generator = turn_of(site, 7, seed=4).generator
    torch.rand((), generator=generator)
    order = torch.randperm(8, generator=generator).tolist() if mix else list(range(8))
    mean_count = 8 / 4  # four classes are in the batch
    total = 0.0
    for i in range(8):
        h = (features[i] + features[order[i]]) / 2
        for label in (labels[i], labels[order[i]]):
            length = math.sqrt(mean_count / labels.count(label)) if lengths else 1.0
            cosine = float(h @ site.model.etf[:, label].double() / h.norm())
            total += (length * cosine - length) ** 2 / 2
    assert float(loss.detach()) == pytest.approx(3.0 * total / 16, rel=1e-5)
    # Were the order its own inverse, both labels' losses would be the same sum.
    assert not mix or [order[i] for i in order] != list(range(8))


def test_length_factors():
    torch.testing.assert_close(nc_fscil.length_factors(torch.tensor([4, 1, 9])), torch.ones(3))
    found = nc_fscil.length_factors(torch.tensor([2, 7, 7, 7]))
    torch.testing.assert_close(found, torch.tensor([math.sqrt(2), *[math.sqrt(2 / 3)] * 3]))


def test_the_rounds_phases():
    trainer = site_of(FILE, SMALL).trainer
    sessions = [trainer.session(number) for number in range(14)]
    assert sessions == [0] * 7 + [1, 1, 2, 2, 2, 2, 2]
    assert [trainer.seen(s) for s in (0, 1, 2)] == [6, 8, 10]
    assert [trainer.frozen(number) for number in (6, 7)] == [(), ("backbone.",)]


def test_every_side_builds_the_same_simplex_and_nobody_sends_or_trains_it():
    one, other = site_of(FILE, SMALL), site_of(FILE, SMALL)
    assert torch.equal(one.model.etf, other.model.etf)
    assert not torch.equal(one.model.etf, site_of(FILE, SMALL, seed=1).model.etf)
    assert "etf" not in one.initial()
    before = one.model.etf.clone()
    for number in (1, 7):
        one.trainer.fit(one.model, one.federation.client(0), {}, turn_of(one, number))
        assert torch.equal(one.model.etf, before)


def test_a_session_trains_the_neck_alone_on_what_the_client_keeps():
    site = site_of(FILE, [*SMALL, "trainer.copies=3"])
    trainer, data, state = site.trainer, site.federation.client(0), {}
    backbone = {k: v.clone() for k, v in site.model.state_dict().items() if k.startswith("backbone.")}
    neck = site.model.neck.shortcut.weight.clone()
    trainer.fit(site.model, data, state, turn_of(site, 7))
    assert all(torch.equal(site.model.state_dict()[k], v) for k, v in backbone.items())
    assert not torch.equal(site.model.neck.shortcut.weight, neck)
    kept = state[nc_fscil.MEMORY]
    assert {label: len(maps) for label, maps in kept.items()} == {**dict.fromkeys(range(6), 1), 6: 5, 7: 5}
    images = data.train.batch((data.train.fields["y"][data.train.rows] == 2).nonzero()[:, 0])
    torch.testing.assert_close(kept[2][0], site.model.eval().backbone(images.x).mean(0))
    # Session 2: the shots of session 1 are one mean each by now, three times among the data.
    memory = trainer.memory(site.model, data.train, state, 2)
    assert torch.bincount(memory.fields["y"]).tolist() == [1] * 6 + [3, 3, 5, 5]
    assert {len(maps) for label, maps in kept.items() if label < 8} == {1}


@pytest.mark.parametrize("stored", [False, True])
def test_base_images_are_not_read_again(stored):
    """After a client's first session turn the images it has seen can be gone: the next turn gives the same bits.

    So it is where that turn is another process's, which has the client's state from a file.
    """
    results = []
    for erase in (False, True):
        site, state = site_of(FILE, SMALL), {}
        site.trainer.fit(site.model, site.federation.client(0), state, turn_of(site, 7))
        if erase and stored:
            learnt = site.trainer.shared(site.model)
            site, state = site_of(FILE, SMALL), client_state.unpack(client_state.pack(state))
            site.trainer.load_shared(site.model, learnt)
        x, y = (site.federation.data.train.fields[name] for name in ("x", "y"))
        before = x.clone()
        if erase:
            x[y < 8] = torch.nan
        try:
            site.trainer.fit(site.model, site.federation.client(0), state, turn_of(site, 9))
        finally:
            x.copy_(before)  # data sets are kept for the life of the process
        results.append(site.model.neck.shortcut.weight.clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("classifier", ["etf", "learnable"])
def test_a_replay_takes_the_base_sessions_own_steps(classifier, monkeypatch):
    """The overhead probe asks for batches of all a client holds; those of later classes are not trained on."""
    site = site_of(FILE, [*SMALL, f"trainer.classifier={classifier}"])
    labels, backward = [], site.trainer.backward

    def seen(model, batch, turn):
        labels.append(batch.y.tolist())
        return backward(model, batch, turn)

    monkeypatch.setattr(site.trainer, "backward", seen)
    turns = [turn_of(site, 1) for _ in range(2)]
    site.train(turns[0], {})
    trained = list(labels)
    labels.clear()
    assert site.bare(turns[1], {})["metrics"]["bare_s"] > 0
    assert labels == trained
    assert max(map(max, labels)) == 5


def test_a_sessions_replay_is_refused():
    """Its steps are on maps that only `fit` has; raw images would time what no client does."""
    site = site_of(FILE, SMALL)
    with pytest.raises(PluginError, match=r"session 1 of trainer 'nc-fscil' .* only x and y") as caught:
        site.bare(turn_of(site, 7), {})
    assert caught.value.code == "fscil-maps"


def test_predictions_are_among_the_classes_seen():
    site = site_of(FILE, SMALL)
    split = site.federation.data.test
    metrics = {number: site.trainer.evaluate(site.model, split, turn_of(site, number, -1)) for number in (1, 7, 9)}
    assert [metrics[number]["classes"] for number in metrics] == [6, 8, 10]
    maps = site.model.eval().backbone(split.batch(torch.arange(50)).x)
    assert int(site.model.scores(maps, 8).argmax(1).max()) < 8
    assert "accuracy-novel" not in metrics[1]
    assert 0 < metrics[9]["accuracy-novel"] < 1
    own = site.trainer.evaluate(site.model, split, turn_of(site, 1, client=0))
    assert own["num-examples"] == int((split.fields["y"][split.rows] < 6).sum())


def test_a_client_without_images_of_the_classes_so_far():
    site = site_of(FILE, SMALL)
    whole = site.federation.client(0)
    late = whole.train.subset((whole.train.fields["y"][whole.train.rows] == 9).nonzero()[:, 0])
    for number in (1, 7):
        metrics = site.trainer.fit(site.model, type(whole)(0, late, late), {}, turn_of(site, number))
        assert metrics == {"loss": 0.0, "num-examples": 1}
    with pytest.raises(DataError, match="first 6 classes"):
        site.trainer.evaluate(site.model, late, turn_of(site, 1))


@pytest.mark.parametrize(
    ("override", "code", "text"),
    [
        ("trainer.dim=9", "fscil-dimension", "trainer.dim is 9; .* 10 classes needs at least 10"),
        ("trainer.base_classes=10", "fscil-classes", "trainer.base_classes is 10; .* must be at most 9"),
        ("trainer.widths=[4, 4, 4, 4]", "fscil-widths", "trainer.widths has 4 blocks, .* 8x8 pixels allow at most 3"),
    ],
)
def test_what_does_not_fit_is_named_with_what_would(override, code, text):
    with pytest.raises(ScenarioError, match=text) as caught:
        site_of(FILE, [*SMALL, override])
    assert caught.value.code == code


@pytest.mark.parametrize("classifier", ["etf", "learnable"])
def test_what_is_frozen_travels_once_and_changes_no_bit(tmp_path, classifier):
    digests, traffic = {}, {}
    for strategy in ("partial", "fedavg"):
        overrides = (f"strategy={strategy}", f"trainer.classifier={classifier}", "evaluation.federated_every=0")
        current, outcome = run(tmp_path, overrides, TEXT)
        assert not outcome.failed, outcome.failed
        digests[strategy] = outcome.summaries[0]["sha256"]
        traffic[strategy] = [(line["bytes_down"], line["bytes_up"]) for line in lines(current)[1::2]]
    assert digests["partial"] == digests["fedavg"]
    (base, first, later), (plain, *_) = traffic["partial"], traffic["fedavg"]
    assert base == plain
    assert base[1] > 2 * first[1] == 2 * later[1]  # the neck alone comes back from the first session on
    assert later[0] < first[0]  # and goes out alone from the second round on


@pytest.mark.parametrize("cut", [3, 4])
def test_private_means_survive_a_restart(tmp_path, cut):
    """Stopped in the first or second session, a run goes on to the same bits: means and backbone are in the state."""
    _, whole = run(tmp_path, (), TEXT)
    broken = Run.create(tmp_path / "cut", scenario.load(tmp_path / "digits.yaml"))

    class Stop(Exception):
        pass

    def stop(_, line):
        if line["round"] == cut:
            raise Stop

    with pytest.raises(Stop):
        experiment.execute(broken, experiment.Hooks(on_round=stop))
    outcome = experiment.execute(Run.open(broken.path))
    assert outcome.summaries[0]["sha256"] == whole.summaries[0]["sha256"]


def test_a_client_that_lost_its_state_says_so():
    site = site_of(FILE, SMALL)
    arrays = site.initial()
    part = RecordDict(
        {
            "arrays": records.array_record({k: records.view(v) for k, v in arrays.items() if k.startswith("neck.")}),
            "config": ConfigRecord({"server-round": 8, records.PARTIAL: True}),
        }
    )
    turn = site.turn(Message(part, flower.node_of(0), "train"), 0, "train")
    with pytest.raises(DataError) as caught:
        site.train(turn, {})
    assert caught.value.code == "partial-missing"
    state = {}
    whole = Message(RecordDict({**part, "arrays": arrays}), flower.node_of(0), "train")
    reply = site.train(site.turn(whole, 0, "train"), state)
    assert set(reply["arrays"]) == set(part["arrays"])
    again = site.train(turn, client_state.unpack(client_state.pack(state)))
    assert set(again["arrays"]) == set(part["arrays"])


@pytest.mark.parametrize("policy", ["average", "local"])
def test_contract(policy):
    contract.check(FILE, [*SMALL, f"trainer.batch_norm={policy}"])
