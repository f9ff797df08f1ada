"""CCVR in whole runs: what it changes and what it leaves alone, who answers, and how it goes on after a crash."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from federations import DIGITS, lines, run, sha, write
from trellis import experiment, scenario
from trellis.data.loading import load_federation
from trellis_clients.queries import moments as query
from trellis_clients.site import Cell, Site, client_mods
from trellis_server import moments

CCVR = DIGITS + "strategy: {name: ccvr, base: {name: fedavgm, server_momentum: 0.5}, epochs: 5}\n"
PLAIN = DIGITS + "strategy: {name: fedavgm, server_momentum: 0.5}\n"
NORMED = "model={name: small-cnn, norm: batch, width: 4, hidden: 24}"


def weights(current) -> dict[str, np.ndarray]:
    return load_file(current.path / "cells/main-seed0/model.safetensors")


def last(current) -> dict:
    return lines(current)[-1]


def spoil(monkeypatch, client: int, change) -> None:
    """Let one client answer with something else."""
    honest = query.answer

    def answer(trainer, model, data, state, turn):
        metrics = honest(trainer, model, data, state, turn)
        if turn.client == client:
            change(turn.reply["moments"])
        return metrics

    monkeypatch.setattr(query, "answer", answer)


@pytest.fixture
def pools(monkeypatch) -> list[moments.Pool]:
    """The pools that virtual features are drawn from."""
    seen: list[moments.Pool] = []
    draw = moments.virtual_features

    def spy(pool, *args, **kwargs):
        seen.append(pool)
        return draw(pool, *args, **kwargs)

    monkeypatch.setattr(moments, "virtual_features", spy)
    return seen


@pytest.mark.parametrize("model", ["model={name: mlp, hidden: [16]}", NORMED], ids=["mlp", "batch norm"])
def test_all_but_the_head_is_the_bases_model_bit_for_bit(tmp_path, model):
    # Server momentum drives a running variance below zero, so the second model is averaged plainly.
    plainly = model == NORMED
    around, outcome = run(tmp_path, (model, *(["strategy.base=fedavg"] * plainly)), CCVR)
    alone, _ = run(tmp_path, (model, *(["strategy=fedavg"] * plainly)), PLAIN)
    assert not outcome.failed
    ours, plain = weights(around), weights(alone)
    assert ours.keys() == plain.keys()
    for name in plain:
        assert np.array_equal(ours[name], plain[name]) != name.startswith("head."), name
        assert ours[name].dtype == plain[name].dtype
    assert [line["round"] for line in lines(around)] == [0, 1, 2, 3, 4, 5]
    assert [line["central"] for line in lines(around)[:-1]] == [line["central"] for line in lines(alone)]


def test_no_epochs_leave_the_head_too(tmp_path):
    idle, _ = run(tmp_path, ("strategy.epochs=0",), CCVR)
    alone, _ = run(tmp_path, text=PLAIN)
    for name, values in weights(alone).items():
        assert np.array_equal(weights(idle)[name], values)
    step = last(idle)["finish"]
    assert step["accuracy-before"] == step["accuracy-after"] == last(alone)["central"]["accuracy"]


def test_pooled_moments_are_those_of_all_features_together(tmp_path, pools):
    """Over the wire in float64 and pooled, against numpy on every client's features under the final extractor."""
    current, _ = run(tmp_path, ("strategy.precision=float64", "strategy.base=fedavg", NORMED), CCVR)
    federation = load_federation(current.scenario, 0)
    site = Site(Cell(scenario.plain(current.scenario), 0, federation.parts, federation.test_parts))
    site.load({name: torch.from_numpy(values) for name, values in weights(current).items()}, {})
    found = [query.extract(site.model, federation.client(client).train) for client in range(6)]
    features, labels = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    (pool,) = pools
    assert pool.classes == sorted(set(labels.tolist()))
    for label in pool.classes:
        z = features[labels == label].astype(np.float64)
        assert pool.count(label) == len(z)
        np.testing.assert_allclose(pool.mean(label), z.mean(0), atol=1e-8)
        np.testing.assert_allclose(pool.covariance(label), np.cov(z.T, ddof=1), atol=1e-8)


def test_what_it_did_and_cost_is_written_down(tmp_path):
    current, _ = run(tmp_path, ("evaluation.federated_every=0",), CCVR)
    line = last(current)
    step = line["finish"]
    assert step["clients-asked"] == 6
    assert step["clients-used"] == [0, 1, 2, 3, 4, 5]
    assert step["clients-refused"] == step["clients-failed"] == line["failures"] == []
    assert (step["bytes-up"], step["bytes-down"]) == (line["bytes_up"], line["bytes_down"])
    assert step["bytes-up"] > 0
    assert step["accuracy-after"] == line["central"]["accuracy"]
    assert step["accuracy-before"] == lines(current)[-2]["central"]["accuracy"]
    assert step["tested-classes"] == step["classes"] == list(range(10))
    norms = np.linalg.norm(weights(current)["head.weight"], axis=1)
    np.testing.assert_allclose(step["weight-norms-after"], norms, rtol=1e-5)
    share = np.bincount(load_federation(current.scenario, 0).data.test.batch(torch.arange(359)).y.numpy()) / 359
    for when in ("before", "after"):
        assert np.dot(share, step[f"class-accuracy-{when}"]) == pytest.approx(step[f"accuracy-{when}"])
    assert "epsilon" not in step
    rows = [row for row in lines(current, "clients.jsonl") if row["phase"] == "query"]
    assert [row["client"] for row in rows] == list(range(6))


def test_a_crash_before_the_last_step_changes_nothing(tmp_path):
    whole = sha(tmp_path, text=CCVR)

    class Broken(Exception):
        pass

    def break_off(_, line):
        if line["round"] == 4:
            raise Broken

    current = experiment.Run.create(tmp_path / "runs", scenario.load(write(tmp_path, CCVR, "broken.yaml")))
    with pytest.raises(Broken):
        experiment.execute(current, experiment.Hooks(on_round=break_off))
    assert [line["round"] for line in lines(current)] == [0, 1, 2, 3, 4]
    outcome = experiment.execute(experiment.Run.open(current.path))
    assert [line["round"] for line in lines(current)] == [0, 1, 2, 3, 4, 5]
    assert outcome.summaries[0]["sha256"] == whole


def test_the_same_bits_on_ray(tmp_path, ray_session):
    assert sha(tmp_path, ("runtime.grid=ray", "runtime.workers=2"), CCVR) == sha(tmp_path, text=CCVR)


def indefinite(reply) -> None:
    reply["triangles"][0] = 1.0
    reply["triangles"][0, 0] = -1.0


@pytest.mark.parametrize(
    ("change", "gate", "reason"),
    [
        (indefinite, True, "psd: the covariance of class"),
        (lambda reply: reply["counts"].neg_(), True, "count: counts from -"),
        (lambda reply: reply["labels"].add_(50), True, "label: class 5"),
        (lambda reply: reply["means"].fill_(torch.nan), True, "nonfinite: moments/means"),
        (lambda reply: reply["means"].fill_(torch.nan), False, "nonfinite: means"),
        (lambda reply: reply.pop("means"), True, "names: missing: moments/means"),
        (lambda reply: reply.update(means=reply["means"].repeat(1, 2)), True, "shape: moments/means has shape"),
        (lambda reply: reply.update(means=reply["means"].repeat(1, 2)), False, "shape: means is float32"),
        (
            lambda reply: reply.update({k: v.repeat(30, *[1] * (v.ndim - 1)) for k, v in reply.items()}),
            True,
            "oversized",
        ),
    ],
    ids=["indefinite", "counts", "labels", "nan", "nan ungated", "missing", "width", "width ungated", "oversized"],
)
def test_a_hostile_client_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, change, gate, reason):
    spoil(monkeypatch, 3, change)
    current, outcome = run(tmp_path, (f"screening.enabled={str(gate).lower()}",), CCVR)
    assert not outcome.failed
    line = last(current)
    assert line["finish"]["clients-used"] == [0, 1, 2, 4, 5]
    assert sorted(line["finish"]["clients-refused"] + line["finish"]["clients-failed"]) == [3]
    ((client, phase, text),) = [failure.values() for failure in line["failures"]]
    assert (client, phase) == (3, "query")
    assert reason in text
    (row,) = [row for row in lines(current, "clients.jsonl") if row["round"] == 5 and not row["ok"]]
    assert (row["client"], row["phase"]) == (3, "query")


def test_too_few_usable_answers_stop_the_run_where_it_can_go_on(tmp_path, monkeypatch):
    honest = query.answer
    spoil(monkeypatch, 3, indefinite)
    current, outcome = run(tmp_path, ("strategy.min_clients=6",), CCVR)
    message = str(outcome.failed["main-seed0"])
    assert "5 of 6 clients gave usable moments, 6 were needed" in message
    assert "client 3: psd" in message
    assert [line["round"] for line in lines(current)] == [0, 1, 2, 3, 4]
    monkeypatch.setattr(query, "answer", honest)
    again = experiment.execute(experiment.Run.open(current.path))
    assert again.summaries[0]["sha256"] == sha(tmp_path, text=CCVR)


def test_a_cohort_of_clients_and_a_low_rank_upload(tmp_path, pools):
    options = ("strategy.clients=3", "strategy.upload=low-rank", "strategy.rank=2")
    current, outcome = run(tmp_path, options, CCVR)
    step = last(current)["finish"]
    assert not outcome.failed
    assert step["clients-asked"] == len(step["clients-used"]) == 3
    whole, _ = run(tmp_path, ("strategy.clients=3",), CCVR)
    assert last(whole)["finish"]["clients-used"] == step["clients-used"]
    assert step["bytes-up"] < last(whole)["finish"]["bytes-up"]
    for label in pools[0].classes:
        low, full = pools[0].covariance(label), pools[1].covariance(label)
        np.testing.assert_allclose(low.diagonal(), full.diagonal(), rtol=1e-4, atol=1e-6)


def test_classes_that_nobody_reports_keep_their_rows(tmp_path, pools):
    current, _ = run(tmp_path, ("strategy.min_count=46",), CCVR)
    alone, _ = run(tmp_path, text=PLAIN)
    reported = last(current)["finish"]["classes"]
    assert reported == pools[0].classes
    silent = sorted(set(range(10)) - set(reported))
    assert reported
    assert silent, "the test needs a class that no client has so many of"
    for name in ("head.weight", "head.bias"):
        ours, plain = weights(current)[name], weights(alone)[name]
        assert np.array_equal(ours[silent], plain[silent])
        assert not (ours[reported] == plain[reported]).any()


def test_clients_that_report_nothing_leave_the_model_as_it_was(tmp_path):
    current, outcome = run(tmp_path, ("strategy.min_count=5000",), CCVR)
    alone, _ = run(tmp_path, text=PLAIN)
    assert not outcome.failed
    assert last(current)["finish"]["classes"] == []
    for name, values in weights(alone).items():
        assert np.array_equal(weights(current)[name], values)


def test_noise_is_stated_as_epsilon_and_delta(tmp_path):
    noise = "strategy.noise={clip_norm: 4.0, multiplier: 2.0}"
    current, outcome = run(tmp_path, (noise,), CCVR)
    assert not outcome.failed
    step = last(current)["finish"]
    assert step["delta"] == 1e-5
    assert 1 < step["epsilon"] < 3
    assert sha(tmp_path, (noise,), CCVR) == outcome.summaries[0]["sha256"]
    assert sha(tmp_path, (noise.replace("2.0", "3.0"),), CCVR) != outcome.summaries[0]["sha256"]


@pytest.mark.parametrize("policy", ["local", "recalibrate"])
def test_clients_with_extractors_of_their_own_are_refused_before_the_first_round(tmp_path, policy):
    current, outcome = run(tmp_path, (NORMED, f"trainer.batch_norm={policy}"), CCVR)
    assert "needs one feature extractor for all clients, but they keep 'body.1." in str(outcome.failed["main-seed0"])
    assert not lines(current)


def test_the_bases_client_mods_run(tmp_path):
    base = "strategy.base={name: dp-client-fixed, noise_multiplier: 0.0, clipping_norm: 0.001}"
    assert client_mods(scenario.load(write(tmp_path, CCVR), (base,))) == ("fixedclipping",)
    current, outcome = run(tmp_path, (base, "screening.allow_unchanged=true"), CCVR)
    assert not outcome.failed
    norms = [row["norm"] for row in lines(current, "clients.jsonl") if row["phase"] == "train"]
    assert max(norms) < 0.0011


def test_calibration_mends_a_head_that_skew_has_spoiled(tmp_path):
    skewed = ("clients=10", "partition={name: dirichlet, alpha: 0.1}", "rounds={count: 6}", "strategy.epochs=50")
    current, _ = run(tmp_path, (*skewed, "trainer={name: moon, lr: 0.1, local_epochs: 2}"), CCVR)
    step = last(current)["finish"]
    assert step["accuracy-after"] > step["accuracy-before"] + 0.05
