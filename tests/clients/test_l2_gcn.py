"""Layer-wise training against dense algebra and end-to-end training; what a controller sees, learns and decides."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from federations import lines, run, sha
from test_bits import resumed
from trellis import scenario
from trellis.data.loading import load_data
from trellis.errors import ScenarioError
from trellis.runs import read_lines
from trellis_clients import contract
from trellis_clients.trainer import Turn
from trellis_clients.trainers.graphs import _pieces
from trellis_clients.trainers.graphs._controller import Controller, took
from trellis_clients.trainers.graphs.l2_gcn import LayeredGcn

SCENARIO = Path(__file__).parents[2] / "scenarios" / "trainers" / "l2-gcn.yaml"
TEXT = """\
name: l2gcn
data: digit-graph
partition: {name: natural-id, test_fraction: 0.1}
trainer: {name: l2-gcn, controller: fixed, layer_epochs: 2, local_epochs: 1, hidden: 4}
rounds: {count: 4}
screening: {allow_unchanged: true, max_norm_ratio: null}
runtime: {grid: local}
"""
LEARNED = TEXT.replace(
    "controller: fixed", "controller: learned, search_rounds: 2, search_trials: 2, search_nodes: 40, min_epochs: 1"
)


@pytest.fixture(scope="module")
def data():
    return load_data(scenario.load(SCENARIO), 0)


def turn_of(number: int, client: int = 0) -> Turn:
    return Turn(number, 10, client, 4, torch.Generator().manual_seed(number))


def site_of(*overrides: str):
    return contract.site_of(SCENARIO, ["variants={}", *overrides])


# -- the graph --------------------------------------------------------------------------------------------------------


def test_the_graph_is_as_it_was_ordered(data):
    edges, y = data.facts["edges"].numpy(), data.train.fields["y"].numpy()
    pairs = set(map(tuple, edges.T.tolist()))
    assert len(pairs) == edges.shape[1]
    assert all((b, a) in pairs and a != b for a, b in pairs)
    held_out = np.isin(edges, data.test.rows.numpy())
    assert (held_out[0] == held_out[1]).all()  # no edge from the held-out graph into the other
    community = dict(zip(data.train.rows.tolist(), data.natural_id, strict=True))
    for part, rows in ((held_out[0], data.test.rows), (~held_out[0], data.train.rows)):
        some = edges[:, part]
        assert some.shape[1] / len(rows) == pytest.approx(8, rel=0.05)
        assert (y[some[0]] == y[some[1]]).mean() == pytest.approx(0.7, abs=0.03)
    near = [community[a] == community[b] for a, b in edges[:, ~held_out[0]].T.tolist()]
    assert np.mean(near) == pytest.approx(0.9, abs=0.02)


def test_images_are_real_and_noise_is_not(data):
    from sklearn.datasets import load_digits

    quiet = load_data(scenario.load(SCENARIO, ["variants={}", "data.noise=0"]), 0)
    digits = load_digits()
    assert np.array_equal(quiet.train.fields["y"].numpy(), digits.target)
    correlation = np.corrcoef(quiet.train.fields["x"].numpy().ravel(), digits.data.ravel())[0, 1]
    assert correlation == pytest.approx(1)
    added = data.train.fields["x"] - quiet.train.fields["x"]
    assert float(added.std()) == pytest.approx(2, rel=0.01)
    assert not torch.equal(load_data(scenario.load(SCENARIO), 1).train.fields["x"], data.train.fields["x"])


def test_rows_of_the_adjacency_sum_to_two_and_match_the_dense_one(data):
    rows = data.train.rows[torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:200]]
    pairs = _pieces.subgraph(data.facts["edges"], rows)
    dense = torch.zeros(200, 200)
    known = set(map(tuple, data.facts["edges"].T.tolist()))
    for i, a in enumerate(rows.tolist()):
        for j, b in enumerate(rows.tolist()):
            dense[i, j] = (a, b) in known
    with_self = dense + torch.eye(200)
    expected = with_self / with_self.sum(1, keepdim=True) + torch.eye(200)
    found = _pieces.adjacency(pairs, 200).to_dense()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.full((200,), 2.0))
    lonely = _pieces.adjacency(_pieces.subgraph(data.facts["edges"], rows[:1]), 1).to_dense()
    assert lonely.tolist() == [[2.0]]


# -- layers -----------------------------------------------------------------------------------------------------------


def test_one_layer_is_a_one_layer_network_end_to_end():
    """Whole batches: aggregated first or in every step, the losses are the same."""
    losses = {}
    for scheme in ("layer-wise", "end-to-end"):
        site = site_of(f"trainer.scheme={scheme}", "trainer.layers=1", "trainer.batch_size=10000")
        data, state = site.federation.client(0), {}
        losses[scheme] = [site.trainer.fit(site.model, data, state, turn_of(k))["loss"] for k in range(1, 5)]
    np.testing.assert_allclose(losses["layer-wise"], losses["end-to-end"], rtol=1e-4)


def test_stages_products_and_what_is_frozen(monkeypatch):
    calls = []
    product = _pieces.aggregate
    monkeypatch.setattr(_pieces, "aggregate", lambda matrix, x: calls.append(x.shape) or product(matrix, x))
    site = site_of("trainer.layer_epochs=10", "trainer.local_epochs=5", "trainer.layers=3")
    data, state, weights = site.federation.client(0), {}, []
    for number in range(1, 8):
        metrics = site.trainer.fit(site.model, data, state, turn_of(number))
        weights.append([w.detach().clone() for w in (*site.model.weights, site.model.classifier)])
        stage = min((number - 1) // 2, 3)
        assert metrics["stage"] == stage
        assert metrics["epochs"] == min(5 * number, 30)
        frozen = site.trainer.frozen(number)
        assert frozen == tuple(f"weights.{layer}" for layer in range(stage))
    assert len(calls) == 3  # once a layer, whatever the number of steps
    assert [shape[1] for shape in calls] == [64, 16, 16]
    for (before, after), stage in zip(pairwise(weights), (0, 1, 1, 2, 2, 3), strict=True):
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert moved == [layer == stage for layer in range(3)] + [stage < 3]


def test_every_epoch_has_its_loss_though_last_batches_are_left_out():
    ends = []
    for drop_last in ("true", "false"):
        site = site_of(f"trainer.drop_last={drop_last}", "trainer.batch_size=100", "trainer.local_epochs=3")
        site.trainer.fit(site.model, site.federation.client(0), {}, turn_of(1))
        start, end = site.model.schedule[3:5].tolist()
        assert 0 < end < start
        ends.append(end)
    assert ends[0] != ends[1]


def test_end_to_end_multiplies_twice_a_step(monkeypatch):
    calls = []
    product = _pieces.aggregate
    monkeypatch.setattr(_pieces, "aggregate", lambda matrix, x: calls.append(x.shape) or product(matrix, x))
    site = site_of("trainer.scheme=end-to-end")
    metrics = site.trainer.fit(site.model, site.federation.client(0), {}, turn_of(1))
    assert metrics["products"] == len(calls) == 2 * 5


def test_no_gradient_leaves_the_layer_in_training():
    site = site_of()
    site.model.schedule[0] = 1
    h = torch.randn(8, 16)
    batch = contract.Batch({"h": h, "y": torch.arange(8)}, torch.arange(8))
    site.trainer.backward(site.model, batch, turn_of(1))
    grads = [w.grad for w in (*site.model.weights, site.model.classifier)]
    assert grads[0] is None
    assert all(bool(g.any()) for g in grads[1:])
    trained = {id(p) for group in site.trainer.optimizer(site.model, turn_of(1)).param_groups for p in group["params"]}
    assert trained == {id(site.model.weights[1]), id(site.model.classifier)}


def test_the_network_is_the_stack_of_stages():
    """On the training nodes alone, evaluating gives to the bit what the stages saw."""
    site = site_of("trainer.layer_epochs=5")
    data, state = site.federation.client(0), {}
    for number in (1, 2):
        site.trainer.fit(site.model, data, state, turn_of(number))
    assert state["stage"] == 1
    logits = site.trainer.network(
        site.model, data.train.fields["x"][data.train.rows], site.trainer.matrix(data.train.rows)
    )
    assert torch.equal(logits, site.model(state["features"], 1))


def test_features_are_made_anew_from_the_averaged_weights():
    """A client whose own weights went another way than the average must not keep features of its own."""
    site = site_of("trainer.layer_epochs=5")
    data, state = site.federation.client(0), {}
    site.trainer.fit(site.model, data, state, turn_of(1))
    with torch.no_grad():
        site.model.weights[0].add_(1.0)  # as if averaged with others
    below = state["features"].clone()
    site.trainer.fit(site.model, data, state, turn_of(2))
    expected = _pieces.aggregate(site.trainer.matrix(data.train.rows), F.relu(below @ site.model.weights[0].detach()))
    assert torch.equal(state["features"], expected)


def test_a_client_evaluates_among_its_own_nodes_and_the_cloud_among_the_held_out():
    site = site_of()
    data = site.federation.client(1)
    turn = turn_of(1, 1)
    alone = site.trainer.evaluate(site.model, data.test, turn)
    turn.data = data
    among = site.trainer.evaluate(site.model, data.test, turn)
    assert alone["loss"] != among["loss"]
    rows = torch.cat([data.test.rows, data.train.rows])
    logits = site.trainer.network(site.model, data.test.fields["x"][rows], site.trainer.matrix(rows))
    y = data.test.fields["y"][data.test.rows]
    assert among["loss"] == pytest.approx(float(F.cross_entropy(logits[: len(y)], y).detach()))


# -- the controller ---------------------------------------------------------------------------------------------------


def test_what_the_controller_sees():
    controller = Controller(layers=2, most=20)
    seen = controller.features(-0.4, 1, took(controller.fresh(), 0))
    assert seen.shape == (8,)
    torch.testing.assert_close(seen[:3], torch.tensor([0.06, 0.06, 0.1]))
    assert torch.equal(seen[3:], controller.past.weight[2])  # second decision, after a 0
    assert torch.equal(controller.features(0.0, 0, controller.fresh())[:3], torch.full((3,), 0.1))
    assert torch.equal(controller.features(0, 0, took(took(controller.fresh(), 0), 1))[3:], controller.past.weight[5])
    assert sum(p.numel() for p in Controller(6, 20).heads.parameters()) == 20 * 18


def settle(controller: Controller, *words: str) -> None:
    """Make the controller continue, stop or draw (with stop probability 0.6) for certain at each of its decisions."""
    logits = {"continue": (30.0, -30.0), "stop": (-30.0, 30.0), "draw": (0.0, 0.4055)}
    with torch.no_grad():
        for head, word in zip(controller.heads, words, strict=True):
            head.weight.zero_()
            head.bias.copy_(torch.tensor(logits[word]))


def trials(*overrides: str, words: tuple[str, ...] = ()):
    """Return a controller, and a function that makes a trial of it on client 0's nodes."""
    shared = ("trainer.controller=learned", "trainer.local_epochs=3", *overrides)
    site = site_of(*shared, f"trainer.decisions={len(words)}")
    controller, data = site.model.controller, site.federation.client(0).train
    settle(controller, *words)

    def trial(seed: int = 1):
        torch.manual_seed(0)  # of the network's weights
        return site.trainer.trial(controller, data, turn_of(seed))

    return controller, trial


def test_a_decision_follows_training():
    """A layer that is to stop at once has its epochs all the same, and so has one that nobody is left to ask about."""
    _, trial = trials(words=("stop", "stop", "continue"))
    assert trial()[1:2] == ([1.0, 1.0],)
    assert trial()[3] == 2 * 3
    _, trial = trials(words=("continue", "continue", "continue"))
    _, stops, _, epochs = trial()
    assert len(stops) == 3
    assert epochs == (3 + 1) * 3 + 3  # all decisions in the first layer, and one more time it is trained; then the last


def test_the_loss_is_seen_against_the_first_of_all(monkeypatch):
    seen = []
    features = Controller.features
    monkeypatch.setattr(Controller, "features", lambda self, *a: seen.append(a[:2]) or features(self, *a))
    _, trial = trials(words=("continue", "stop", "stop"))
    loss = trial()[2]
    assert [layer for _, layer in seen] == [0, 0, 1]
    changes = [change for change, _ in seen]
    assert changes[1] < changes[0] < 0
    site = site_of()
    nodes = site.federation.client(0).train
    x, y = (nodes.fields[name][nodes.rows] for name in ("x", "y"))
    torch.manual_seed(0)
    untrained = LayeredGcn((64, 16, 16), 10)(_pieces.aggregate(site.trainer.matrix(nodes.rows), x), 0)
    start = float(F.cross_entropy(untrained, y).detach())
    assert changes[2] == pytest.approx(loss - start, abs=1e-6)  # and not against the second layer's own start


def test_reinforce_follows_what_the_trial_did(monkeypatch):
    """Three drawn decisions, replayed: log-probability of the actions taken, and softmax's gradient at each head."""
    controller, trial = trials("trainer.layers=1", words=("draw", "draw", "draw"))
    for head in controller.heads:
        torch.nn.init.normal_(head.weight)  # so that what was remembered counts
    seen, features = [], Controller.features
    monkeypatch.setattr(Controller, "features", lambda self, *a: seen.append(a[0]) or features(self, *a))
    for seed in range(100):
        seen.clear()
        total, stops, _, epochs = trial(seed)
        if len(stops) == 3:
            break
    actions = [0, 0, int(epochs == 3 * 3)]  # had it gone on at last, it would have trained once more
    total.backward()
    found = [head.bias.grad.clone() for head in controller.heads]
    monkeypatch.undo()

    memory, expected = controller.fresh(), torch.zeros(())
    for change, action, stop, gradient in zip(seen, actions, stops, found, strict=True):
        log_probabilities, memory = controller(change, 0, memory)
        expected, memory = expected + log_probabilities[action], took(memory, action)
        assert float(log_probabilities[1].exp().detach()) == pytest.approx(stop, abs=1e-6)
        torch.testing.assert_close(gradient, torch.eye(2)[action] - torch.tensor([1 - stop, stop]))
    torch.testing.assert_close(total, expected)


def test_search_moves_baseline_and_threshold():
    site = site_of("trainer.controller=learned", "trainer.search_trials=2", "trainer.search_nodes=40")
    before = [p.detach().clone() for p in site.model.controller.parameters()]
    metrics = site.trainer.fit(site.model, site.federation.client(0), {}, turn_of(1))
    moved = [not torch.equal(a, b) for a, b in zip(before, site.model.controller.parameters(), strict=True)]
    assert any(moved)
    assert 0 < float(site.model.baseline[1]) < 1
    assert float(site.model.baseline[0]) != pytest.approx(0.3)
    assert int(site.model.schedule.abs().sum()) == 0
    assert metrics["stage"] == metrics["epochs"] == 0
    assert metrics["products"] == 2 * 2
    assert metrics["trial-epochs"] >= 2 * 2 * 5


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_epochs_cost_what_the_time_ratio_says(monkeypatch, ratio):
    """At time_ratio 0 a trial's cost is its loss, so that nothing ever speaks for stopping but a lower loss."""
    site = site_of("trainer.controller=learned", "trainer.search_trials=1", f"trainer.time_ratio={ratio}")
    one = torch.zeros((), requires_grad=True)
    monkeypatch.setattr(site.trainer, "trial", lambda *_: (one * 1, [0.25], 0.75, 40))
    metrics = site.trainer.fit(site.model, site.federation.client(0), {}, turn_of(1))
    assert metrics["loss"] == pytest.approx(0.75 + 40 * ratio)
    assert float(one.grad) == pytest.approx(0.75 + 40 * ratio - 0.3)
    torch.testing.assert_close(site.model.baseline, torch.tensor([0.3 + 0.1 * (0.45 + 40 * ratio), 0.25]))


def test_a_controller_that_never_stops_is_the_fixed_schedule():
    overrides = {
        "fixed": ["trainer.layer_epochs=10"],
        "learned": [
            "trainer.controller=learned",
            "trainer.min_epochs=0",
            "trainer.max_epochs=10",
            "trainer.search_rounds=0",
        ],
    }
    ends = []
    for changes in overrides.values():
        site = site_of(*changes)
        data, state = site.federation.client(0), {}
        site.model.baseline[1] = 2.0  # no probability reaches it
        for number in range(1, 6):
            metrics = site.trainer.fit(site.model, data, state, turn_of(number))
        ends.append((metrics, [w.detach().clone() for w in (*site.model.weights, site.model.classifier)]))
    assert {**ends[0][0], "trial-epochs": 0} == ends[1][0]
    assert ends[0][0]["epochs"] == 20
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


@pytest.mark.parametrize(("least", "epochs"), [(0, 5), (5, 5), (6, 10)])
def test_an_eager_controller_stops_at_the_least_number_of_epochs(least, epochs):
    """Or after ``local_epochs``: no layer is passed over untrained."""
    site = site_of("trainer.controller=learned", "trainer.search_rounds=0", f"trainer.min_epochs={least}")
    data, state = site.federation.client(0), {}
    site.model.baseline[1] = 0.0
    stages = [site.trainer.fit(site.model, data, state, turn_of(number))["stage"] for number in range(1, 7)]
    assert stages == ([0, 1, 2, 2, 2, 2] if epochs == 5 else [0, 0, 1, 1, 2, 2])
    assert float(site.model.schedule[2]) == 2 * epochs


def test_later_layers_are_seen_against_the_first_epoch_of_all(monkeypatch):
    site = site_of("trainer.controller=learned", "trainer.search_rounds=0", "trainer.min_epochs=5")
    seen, features = [], Controller.features
    monkeypatch.setattr(Controller, "features", lambda self, *a: seen.append(a[:2]) or features(self, *a))
    data, state, ends = site.federation.client(0), {}, []
    site.model.baseline[1] = 0.0
    for number in range(1, 4):
        site.trainer.fit(site.model, data, state, turn_of(number))
        ends.append(site.model.schedule[3:5].tolist())
    assert ends[0][0] == ends[1][0] > ends[0][1]
    assert seen == [(pytest.approx(last - first), layer) for layer, (first, last) in enumerate(ends[:2])]


def test_counters_survive_an_average_that_misses_them_by_a_bit():
    """As a mean of equal float32 numbers under unequal weights may."""
    site = site_of("trainer.layer_epochs=10")
    data, state = site.federation.client(0), {}
    for number in range(1, 4):
        metrics = site.trainer.fit(site.model, data, state, turn_of(number))
        with torch.no_grad():
            site.model.schedule.copy_(torch.nextafter(site.model.schedule, torch.zeros(7)))
        assert metrics["stage"] == site.model.stage == (number - 1) // 2
    assert metrics["epochs"] == 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainer: {name: l2-gcn, scheme: end-to-end}", "set trainer.controller to fixed"),
        ("trainer: {name: l2-gcn, momentum: 0.9}", "momentum must be 0"),
        ("trainer: {name: l2-gcn, min_epochs: 50, max_epochs: 40}", "min_epochs is 50, more than max_epochs, 40"),
        ("strategy: fedadam", "needs strategy 'fedavg', 'fedprox', 'partial', not 'fedadam'"),
        ("strategy: {name: dp-server-fixed, noise_multiplier: 0.1, clipping_norm: 1.0}", "not 'dp-server-fixed'"),
    ],
)
def test_what_does_not_go_together_is_said(tmp_path, change, message):
    key = change.partition(":")[0]
    text = "\n".join([*(line for line in TEXT.splitlines() if not line.startswith(f"{key}:")), change])
    with pytest.raises(ScenarioError, match=message):
        run(tmp_path, (), text)


# -- the federation ---------------------------------------------------------------------------------------------------


def test_what_is_sent_is_the_model_and_never_features():
    names = set(site_of().names)
    assert names == {"weights.0", "weights.1", "classifier", "schedule", "memory", "baseline"}
    assert any(name.startswith("controller.") for name in site_of("trainer.controller=learned").names)
    assert isinstance(site_of().model, LayeredGcn)


def test_all_clients_are_in_one_layer(tmp_path):
    current, _ = run(tmp_path, ("rounds.count=7",), LEARNED)
    rows = [row for row in lines(current, "clients.jsonl") if row["phase"] == "train"]
    for number in range(3, 8):
        assert len({row["metrics"]["stage"] for row in rows if row["round"] == number}) == 1
    stages = [line["train"]["stage"] for line in lines(current)[1:]]
    assert stages == sorted(stages)


@pytest.mark.parametrize("text", [TEXT, LEARNED], ids=["fixed", "learned"])
def test_a_run_resumes_to_the_same_bits(tmp_path, text):
    assert resumed(tmp_path, text) == sha(tmp_path, text=text)


@pytest.mark.parametrize("text", [TEXT, LEARNED], ids=["fixed", "learned"])
def test_features_are_made_once_a_layer_though_the_run_was_broken_off(tmp_path, text):
    """They are in the client's state: lost, they would be made anew from the same weights, to the same bits."""
    text = text.replace("layer_epochs: 2", "layer_epochs: 4").replace("min_epochs: 1", "min_epochs: 4")
    text = text.replace("search_rounds: 2", "search_rounds: 0")
    resumed(tmp_path, text)
    (folder,) = (tmp_path / "runs" / "l2gcn").iterdir()
    products = [line["train"]["products"] for line in read_lines(folder / "cells/main-seed0/metrics.jsonl")[1:]]
    assert products == [1, 0, 0, 0]


def test_a_client_that_sits_out_where_layers_begin_catches_up():
    """Its features are those that it would have, had it been there: of the weights that the layers ended with."""
    site = site_of("trainer.layer_epochs=5", "trainer.layers=3")
    start = {name: values.clone() for name, values in site.model.state_dict().items()}
    there, away, kept = site.federation.client(0), site.federation.client(1), {}
    site.trainer.fit(site.model, away, kept, turn_of(1, 1))  # its weights are averaged away
    site.model.load_state_dict(start)
    for number in (1, 2):
        site.trainer.fit(site.model, there, {}, turn_of(number))
    assert kept["stage"] == 0
    assert site.trainer.fit(site.model, away, kept, turn_of(3, 1))["products"] == 2
    assert kept["stage"] == 2
    afresh, products = site.trainer.features(site.model, away.train, {})
    assert products == 3
    assert torch.equal(kept["features"], afresh)


@pytest.mark.parametrize("cohort", [4, 2])
def test_finished_layers_are_sent_once(tmp_path, cohort):
    cut = (f"rounds.clients_per_round={cohort}",)
    assert sha(tmp_path, cut, TEXT + "strategy: partial\n") == sha(tmp_path, cut, TEXT)


@pytest.mark.parametrize(
    "change",
    [
        ["trainer.controller=learned", "trainer.search_rounds=0", "trainer.min_epochs=5"],
        ["trainer.scheme=end-to-end"],
    ],
    ids=["learned", "end-to-end"],
)
def test_contract(change):
    contract.check(SCENARIO, ["variants={}", *change])
