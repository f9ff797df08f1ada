"""Federated reconnaissance from a scenario file: growing classes, the same bits resumed, and hostile clients."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from federations import lines, run, sha
from test_bits import Reversed
from trellis import experiment, scenario
from trellis.data.loading import load_federation
from trellis.missions import Missions, Schedule
from trellis.runs import Run

RECON = """\
name: recon
data: {name: rotated-digits, size: 8, rotations: [0, 90]}
clients: 3
model: {name: mlp, hidden: [24]}
trainer: {name: recon-protonet, episodes: 60, ways: 5, missions: {classes_per_mission: 2, images_per_class: 5}}
strategy: reconnaissance
rounds: {count: 5, quorum: 0.6}
screening: {min_cosine: null}
probe: {every: 0}
runtime: {grid: local}
"""
OTHERS = ("recon-gradient", "recon-icarl", "recon-joint")


def of(trainer: str) -> str:
    return RECON if trainer == "recon-protonet" else RECON.replace("recon-protonet, episodes: 60, ways: 5", trainer)


def test_missions_grow_what_is_known_and_prototypes_forget_nothing(tmp_path):
    current, outcome = run(tmp_path, text=RECON)
    assert not outcome.failed
    rows = lines(current)
    schedule, known = Schedule(Missions(classes_per_mission=2, images_per_class=5), 20, 0), set(range(10))
    assert rows[0]["central"]["classes"] == 0
    assert (rows[1]["cohort"], rows[1]["central"]["classes"]) == (0, 10)
    assert rows[1]["central"]["accuracy"] > 0.6
    for row in rows[2:]:
        for client in range(3):
            known |= set(schedule.classes(row["round"] - 1, client))
        assert row["cohort"] == row["replies"] == 3
        assert row["central"]["classes"] == len(known)
        assert set(row["central"]) >= {"accuracy", "accuracy-base", "accuracy-field", "loss"}
        assert set(row["federated"]) >= {"accuracy", "accuracy-base", "accuracy-field", "accuracy-own"}
        assert set(row["train"]) >= {"accuracy-base", "accuracy-own", "classes"}
        assert row["train"]["rejected"] == 0
    assert len(known) > 14
    assert rows[-1]["central"]["accuracy-base"] > rows[1]["central"]["accuracy-base"] - 0.15


def test_the_final_table_is_the_mean_of_all_images_seen(tmp_path):
    """Independently: embed every image that base training or any client saw with the final encoder, and average."""
    import torch

    from trellis_clients import contract

    current, _ = run(tmp_path, text=RECON)
    arrays = load_file(current.path / "cells/main-seed0/model.safetensors")
    live = contract.site_of(tmp_path / "digits.yaml")
    live.trainer.load_shared(live.model, {name: torch.from_numpy(values) for name, values in arrays.items()})
    federation = load_federation(scenario.load(tmp_path / "digits.yaml"), 0)
    train, schedule = federation.data.train, live.trainer.schedule
    labels = train.fields["y"].numpy()
    seen = [np.flatnonzero(np.isin(labels, schedule.base))]
    for client, part in enumerate(federation.parts):
        seen += [part[schedule.images(labels[part], mission, client)] for mission in range(1, 5)]
    rows = np.concatenate(seen)
    with torch.no_grad():
        features = live.model.eval().features(train.fields["x"][rows]).double().numpy()
    for label in range(20):
        of_label = labels[rows] == label
        assert arrays["counts"][label] == of_label.sum()
        if of_label.any():
            np.testing.assert_allclose(arrays["table"][label], features[of_label].mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trainer", ["recon-protonet", *OTHERS])
def test_twice_reversed_and_resumed_give_the_same_bits(tmp_path, monkeypatch, trainer):
    text = of(trainer)
    first = sha(tmp_path, text=text)
    assert sha(tmp_path, ("seeds=[1]",), text) != first
    assert resumed(tmp_path, text) == first
    server = experiment.app_module("server")
    monkeypatch.setattr(server, "Ordered", Reversed)  # nothing puts the replies back in order
    assert sha(tmp_path, text=text) == first


def resumed(folder, text) -> str:
    """Break a run off after its third round, in the middle of the missions, and go on from the folder alone."""

    class Broken(Exception):
        pass

    def break_off(_, line):
        if line["round"] == 3:
            raise Broken

    path = folder / "resumed.yaml"
    path.write_text(text)
    current = Run.create(folder / "runs", scenario.load(path))
    with pytest.raises(Broken):
        experiment.execute(current, experiment.Hooks(on_round=break_off))
    outcome = experiment.execute(Run.open(current.path))
    assert [line["round"] for line in lines(current)] == [0, 1, 2, 3, 4, 5]
    return str(outcome.summaries[0]["sha256"])


def test_two_ray_workers_give_the_bits_of_one_process(tmp_path, ray_session):
    local = sha(tmp_path, text=RECON)
    assert sha(tmp_path, ("runtime.grid=ray", "runtime.workers=2"), RECON) == local


@pytest.mark.parametrize("trainer", OTHERS)
def test_the_yardsticks_learn_new_classes(tmp_path, trainer):
    current, outcome = run(tmp_path, text=of(trainer))
    assert not outcome.failed
    last = lines(current)[-1]["central"]
    assert last["classes"] > 14
    assert last["accuracy-field"] > 1 / last["classes"]


def test_a_client_with_nothing_new_stays_at_home(tmp_path):
    text = RECON.replace(
        "images_per_class: 5", "images_per_class: 1000, visits: [[[10], [11], [12]], [[10], [13], [12]]]"
    )
    current, outcome = run(tmp_path, text=text)
    assert not outcome.failed
    assert [line["cohort"] for line in lines(current)] == [0, 0, 3, 1, 0, 0]
    assert lines(current)[-1]["central"]["classes"] == 14


# -- hostile clients ----------------------------------------------------------------------------------

HOSTILE = """\
import math, torch
from trellis.registry import register
from trellis_clients.trainers.reconnaissance.recon_protonet import ReconProtonet
from trellis_clients.trainers.reconnaissance.recon_joint import ReconJoint

def spoil(evidence, how):
    if how == "negative count":
        evidence["counts"] = -evidence["counts"]
    if how == "huge count":
        evidence["counts"] = evidence["counts"] + 10**12
    if how == "wrong width":
        evidence["means"] = evidence["means"][:, 1:]
    if how == "unknown label":
        evidence["labels"] = evidence["labels"] + 1000
    if how == "nan":
        evidence["means"] = evidence["means"] * math.nan
    if how == "huge":
        evidence["means"] = evidence["means"] + 1e30
    if how == "label twice":
        evidence["labels"] = evidence["labels"] * 0
    if how == "other dtype":
        evidence["counts"] = evidence["counts"].double()
    if how == "missing":
        del evidence["counts"]
    if how == "ragged":
        evidence["counts"] = evidence["counts"][:1]
    if how == "from the future":
        evidence["version"] = evidence["version"] + 50
    return evidence

@register("trainers", "hostile", takes=("image",), sends="missions", strategies=("reconnaissance",))
class Hostile(ReconProtonet):
    class Config(ReconProtonet.Config):
        how: str = ""

    def answer(self, action, model, data, state, turn):
        metrics = super().answer(action, model, data, state, turn)
        if turn.client == 1:
            turn.reply["evidence"] = spoil(turn.reply["evidence"], self.config.how)
            if self.config.how == "boasts":
                metrics["right-base"] = metrics["total-base"] + 1
        return metrics

@register("trainers", "forger", takes=("image",), sends="missions", strategies=("reconnaissance",))
class Forger(ReconJoint):
    class Config(ReconJoint.Config):
        how: str = ""

    def answer(self, action, model, data, state, turn):
        metrics = super().answer(action, model, data, state, turn)
        pictures = turn.reply["exemplars"]
        if turn.client == 1 and self.config.how == "more":
            turn.reply["exemplars"] = {name: torch.cat([values, values]) for name, values in pictures.items()}
        if turn.client == 1 and self.config.how == "mislabelled":
            turn.reply["exemplars"] = {**pictures, "y": pictures["y"] * 0}
        return metrics
"""

HOW = {
    "negative count": "evidence: the count of label",
    "huge count": "evidence: the count of label",
    "wrong width": "shape: evidence/means has shape [2, 23], not [any, 24]",
    "unknown label": "is none of the 20 classes",
    "nan": "nonfinite: evidence/means has 48 values that are not finite",
    "huge": "beyond 1e+06",
    "label twice": "evidence: a label stands twice",
    "other dtype": "dtype: evidence/counts has dtype float64, not int64",
    "missing": "names: missing: evidence/counts",
    "ragged": "do not go together",
    "boasts": "metrics: right-base is",
    "from the future": "evidence: it is of mission 51; this is mission 1",
}


def hostile(folder, name: str, how: str) -> str:
    (folder / "hostile.py").write_text(HOSTILE)
    params = "episodes: 20, ways: 5" if name == "Hostile" else "base_epochs: 1, joint_epochs: 1"
    text = RECON.replace(
        "recon-protonet, episodes: 60, ways: 5", f"'hostile.py:{name}', how: {json.dumps(how)}, {params}"
    )
    return text.replace("count: 5", "count: 3")


@pytest.mark.parametrize(("how", "reason"), HOW.items(), ids=HOW)
def test_malformed_evidence_is_refused_by_name_and_the_rest_goes_on(tmp_path, how, reason):
    current, outcome = run(tmp_path, text=hostile(tmp_path, "Hostile", how))
    assert not outcome.failed
    schedule, known = Schedule(Missions(classes_per_mission=2, images_per_class=5), 20, 0), set(range(10))
    for row in lines(current)[2:]:
        (failure,) = row["failures"]
        assert (failure["client"], failure["phase"]) == (1, "train")
        assert (row["cohort"], row["replies"]) == (3, 2)
        for client in (0, 2):
            known |= set(schedule.classes(row["round"] - 1, client))
        assert row["central"]["classes"] == len(known)
    assert reason in lines(current)[2]["failures"][0]["reason"]


@pytest.mark.parametrize("how", ["more", "mislabelled"])
def test_pictures_that_the_evidence_does_not_count_are_refused(tmp_path, how):
    current, outcome = run(tmp_path, text=hostile(tmp_path, "Forger", how))
    assert not outcome.failed
    (failure,) = lines(current)[-1]["failures"]
    assert failure["client"] == 1
    assert "exemplars: there are pictures of classes, or more of a class" in failure["reason"]


def test_without_the_gate_the_strategy_itself_refuses(tmp_path):
    text = hostile(tmp_path, "Hostile", "negative count").replace("min_cosine: null", "enabled: false")
    current, outcome = run(tmp_path, text=text)
    assert not outcome.failed
    assert [line["train"]["rejected"] for line in lines(current)[2:]] == [1, 1]
    assert "the count of label" in lines(current)[-1]["failures"][0]["reason"]
    assert lines(current)[-1]["central"]["classes"] < 20


def test_another_trainer_is_an_error_that_names_the_right_ones(tmp_path):
    with pytest.raises(experiment.TrellisError, match="merges missions"):
        run(tmp_path, text=RECON.replace("recon-protonet, episodes: 60, ways: 5, missions", "sgd} #"))
