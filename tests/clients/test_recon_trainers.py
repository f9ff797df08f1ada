"""Learners of federated reconnaissance: the encoder, episodes, evidence, herding, and evaluation by groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trellis import registry
from trellis.errors import DataError, ScenarioError
from trellis_clients import contract
from trellis_clients.site import Site
from trellis_clients.trainer import Turn
from trellis_clients.trainers.reconnaissance import _recon
from trellis_clients.trainers.reconnaissance.recon_icarl import herd
from trellis_clients.trainers.reconnaissance.recon_protonet import squared_distances

SCENARIO = """\
name: recon
data: {name: rotated-digits, size: 8, rotations: [0, 90]}
clients: 2
model: {name: mlp, hidden: [16]}
trainer: {name: recon-protonet, episodes: 20, ways: 4, base_epochs: 1, local_epochs: 1, missions: {images_per_class: 6}}
strategy: reconnaissance
runtime: {grid: local}
"""
TRAINERS = ("recon-protonet", "recon-gradient", "recon-icarl", "recon-joint")


def site(folder: Path, trainer: str = "recon-protonet", text: str = SCENARIO) -> Site:
    if trainer != "recon-protonet":
        text = text.replace("recon-protonet, episodes: 20, ways: 4", trainer)
    (folder / "recon.yaml").write_text(text)
    return contract.site_of(folder / "recon.yaml")


def turn(client: int = 0, mission: int = 1, **received: dict[str, torch.Tensor]) -> Turn:
    generator = torch.Generator().manual_seed(7)
    return Turn(mission + 1, 9, client, 2, generator, {"mission": mission}, received)


def with_base(live: Site) -> torch.Tensor:
    """Give the live model the table of the base classes; return the labels that the table knows."""
    split = live.trainer.base_split(live.federation.data.train)
    evidence = live.trainer.evidence(live.model, split, 0)
    live.trainer.remember(live.model, evidence)
    return evidence["labels"]


# -- the encoder --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "parameters", "width"), [((1, 28, 28), 111_936, 64), ((3, 84, 84), 113_088, 1600)])
def test_the_encoder_has_the_published_size(shape, parameters, width):
    cls = registry.load("models", "four-conv")
    model = cls(cls.Config()).build(shape, 5, {})
    assert sum(p.numel() for p in model.body.parameters()) == parameters
    assert model.features(torch.zeros(2, *shape)).shape == (2, width)
    with pytest.raises(DataError, match="16x16"):
        cls(cls.Config()).build((1, 8, 8), 5, {})


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ScenarioError, match="linear head"):
        _recon.ReconModel(torch.nn.Conv2d(1, 1, 3), 4)


# -- episodes -----------------------------------------------------------------------------------------


def test_episodes_hold_base_classes_with_support_before_queries(tmp_path):
    live = site(tmp_path)
    episodes = list(live.trainer.batches(live.federation.data.train, turn()))
    assert len(episodes) == 20
    for episode in episodes:
        labels = episode.y.view(4, 10)
        assert (labels == labels[:, :1]).all()
        assert set(labels[:, 0].tolist()) <= set(live.trainer.schedule.base)
        assert len(set(labels[:, 0].tolist())) == 4
        assert len(episode.index.unique()) == 40


def test_the_episode_loss_is_cross_entropy_on_distances(tmp_path):
    live = site(tmp_path)
    episode = next(iter(live.trainer.batches(live.federation.data.train, turn())))
    live.model.train()
    features = live.model.features(episode.x)
    classes = episode.y.view(4, 10)[:, 0]
    support = torch.arange(40) % 10 < 5
    means = torch.stack([features[support & (episode.y == label)].mean(0) for label in classes])
    queries = features[~support]
    targets = torch.tensor([(classes == label).nonzero()[0, 0] for label in episode.y[~support]])
    expected = F.cross_entropy(
        -(torch.cdist(queries, means, compute_mode="donot_use_mm_for_euclid_dist") ** 2), targets
    )
    torch.testing.assert_close(live.trainer.loss(live.model, episode, turn()), expected)
    assert squared_distances(queries, means).shape == (20, 4)


def test_too_few_examples_for_an_episode(tmp_path):
    live = site(tmp_path, text=SCENARIO.replace("episodes: 20", "episodes: 20, shots: 500"))
    with pytest.raises(DataError, match=r"505 examples.*trainer\.shots 500"):
        live.trainer.learn_base(live.model, live.trainer.base_split(live.federation.data.train), turn())


def test_meta_training_separates_classes_it_has_not_seen(tmp_path):
    live = site(tmp_path, text=SCENARIO.replace("episodes: 20", "episodes: 150"))

    def accuracy() -> float:
        live.model.counts.zero_()
        live.model.table.zero_()
        live.trainer.remember(live.model, live.trainer.evidence(live.model, live.federation.data.train, 0))
        none = torch.zeros_like(live.model.known)
        judged = live.trainer.judged(live.model, live.federation.data.test, none)
        return judged["right-field"] / judged["total-field"]

    before = accuracy()
    live.trainer.learn_base(live.model, live.trainer.base_split(live.federation.data.train), turn())
    assert accuracy() > before + 0.05


# -- a mission ----------------------------------------------------------------------------------------


def test_evidence_is_count_and_mean_of_the_embeddings(tmp_path):
    live = site(tmp_path)
    with_base(live)
    data, each = live.federation.client(1), turn(client=1, mission=2)
    metrics = live.trainer.answer("mission", live.model, data, {}, each)
    evidence = each.reply["evidence"]
    labels = data.train.fields["y"][data.train.rows].numpy()
    images = live.trainer.schedule.images(labels, 2, 1)
    assert metrics["num-examples"] == len(images) == 12
    assert evidence["labels"].tolist() == list(live.trainer.schedule.classes(2, 1))
    assert evidence["counts"].tolist() == [6, 6]
    assert int(evidence["version"]) == 2
    x = data.train.fields["x"][data.train.rows][images]
    with torch.no_grad():
        features = live.model.eval().features(x).double()
    for place, label in enumerate(evidence["labels"]):
        expected = features[torch.from_numpy(labels[images]) == label].mean(0)
        torch.testing.assert_close(evidence["means"][place].double(), expected, rtol=1e-6, atol=1e-6)


def test_the_clients_own_copy_learns_by_the_running_mean_and_forgets_nothing(tmp_path):
    live = site(tmp_path)
    known = with_base(live)
    before = live.model.table.clone()
    each = turn()
    metrics = live.trainer.answer("mission", live.model, live.federation.client(0), {}, each)
    assert torch.equal(live.model.table[known], before[known])
    torch.testing.assert_close(live.model.table[each.reply["evidence"]["labels"]], each.reply["evidence"]["means"])
    assert metrics["total-own"] > 0
    assert metrics["total-base"] > metrics["total-field"] == metrics["total-own"]


def test_the_frozen_encoder_is_not_touched_by_a_mission(tmp_path):
    live = site(tmp_path)
    with_base(live)
    before = {name: value.clone() for name, value in live.model.net.state_dict().items()}
    live.trainer.answer("mission", live.model, live.federation.client(0), {}, turn())
    assert all(torch.equal(value, before[name]) for name, value in live.model.net.state_dict().items())


def test_a_mission_without_unseen_images(tmp_path):
    text = SCENARIO.replace("images_per_class: 6", "images_per_class: 1000, visits: [[[11]]]")
    live = site(tmp_path, text=text)
    assert live.trainer.answer("mission", live.model, live.federation.client(0), {}, turn())["num-examples"] > 20
    with pytest.raises(DataError, match="client 0 has no unseen images for mission 2"):
        live.trainer.answer("mission", live.model, live.federation.client(0), {}, turn(mission=2))


@pytest.mark.parametrize("name", TRAINERS)
def test_what_a_mission_uploads(tmp_path, name):
    live = site(tmp_path, name)
    with_base(live)
    each = turn()
    live.trainer.answer("mission", live.model, live.federation.client(0), {}, each)
    assert set(each.reply) == {"evidence", *live.trainer.uploads}
    assert each.reply["evidence"]["means"].shape == (2, live.model.table.shape[1] if name == "recon-protonet" else 0)
    arrays = live.trainer.shared(live.model)
    if "arrays" in each.reply:
        assert set(each.reply["arrays"]) == set(arrays)
    assert ("net.head.weight" in arrays) == (name != "recon-protonet")
    assert ("table" in arrays) == (name in ("recon-protonet", "recon-icarl"))
    if "exemplars" in each.reply:
        assert len(each.reply["exemplars"]["x"]) == len(each.reply["exemplars"]["y"]) == 12


def test_fine_tuning_moves_no_logit_of_an_unknown_class(tmp_path):
    live = site(tmp_path, "recon-gradient")
    with_base(live)
    before = live.model.net.head.weight.clone()
    each = turn()
    live.trainer.answer("mission", live.model, live.federation.client(0), {}, each)
    moved = (live.model.net.head.weight != before).any(1)
    known = set(live.trainer.schedule.base) | set(each.reply["evidence"]["labels"].tolist())
    assert set(moved.nonzero()[:, 0].tolist()) == known


def test_icarl_keeps_what_it_knew_better_than_fine_tuning(tmp_path):
    """The same missions from the same base model: distillation and exemplars hold the base classes."""
    base = {}
    for name in ("recon-gradient", "recon-icarl"):
        live = site(tmp_path, name, SCENARIO.replace("base_epochs: 1, local_epochs: 1", "base_epochs: 5"))
        split = live.trainer.base_split(live.federation.data.train)
        live.trainer.learn_base(live.model, split, turn())
        with_base(live)
        _, kept = live.trainer.consolidate(live.model, split, turn(mission=0))
        pool = _recon.examples(split if kept is None else split.subset(kept))
        metrics = live.trainer.answer("mission", live.model, live.federation.client(0), {}, turn(exemplars=pool))
        base[name] = metrics["right-base"] / metrics["total-base"]
    assert base["recon-icarl"] > base["recon-gradient"] + 0.1


# -- herding ------------------------------------------------------------------------------------------


def test_herding_follows_the_mean():
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32))
    members = torch.arange(5, 30)
    chosen = herd(features, members, 6)
    assert len(set(chosen.tolist())) == 6
    mean = features[members].mean(0)
    assert chosen[0] == members[(features[members] - mean).square().sum(1).argmin()]
    herded = (features[chosen].mean(0) - mean).norm()
    first = (features[members[:6]].mean(0) - mean).norm()
    assert herded < first / 2
    assert herd(features, members[:2], 6).sort().values.tolist() == members[:2].tolist()


def test_the_budget_is_shared_by_the_known_classes(tmp_path):
    live = site(tmp_path, "recon-icarl", SCENARIO.replace("base_epochs", "budget: 30, base_epochs"))
    with_base(live)  # ten base classes of twenty
    split = live.trainer.base_split(live.federation.data.train)
    _, kept = live.trainer.consolidate(live.model, split, turn(mission=0))
    assert kept is not None
    counts = torch.bincount(split.fields["y"][split.rows][kept], minlength=20)
    assert counts.tolist() == [3] * 10 + [0] * 10
    norms = live.model.table.norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([1.0] * 10 + [0.0] * 10))


# -- evaluation ---------------------------------------------------------------------------------------


def test_only_known_classes_are_judged_and_predicted(tmp_path):
    live = site(tmp_path)
    test = live.federation.data.test
    nothing = live.trainer.evaluate(live.model, test, turn(client=-1))
    assert nothing == {"accuracy": 0.0, "loss": pytest.approx(np.log(20)), "classes": 0}
    known = with_base(live)
    judged = live.trainer.evaluate(live.model, test, turn(client=-1))
    assert judged["classes"] == len(known) == 10
    assert judged["accuracy"] == judged["accuracy-base"] > 0.5
    assert "accuracy-field" not in judged
    y = test.fields["y"][test.rows]
    mine = live.trainer.judged(live.model, test, torch.arange(20) == 3)
    assert mine["total-base"] == int((y < 10).sum())
    assert mine["total-own"] == int((y == 3).sum())
    assert mine["total-field"] == 0
