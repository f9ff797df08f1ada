"""Graph drawing against matrix calculus and eigenvectors; what leaves a client and what stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from federations import lines, run, sha
from test_bits import resumed
from trellis import scenario
from trellis.data.base import Split
from trellis.data.loading import load_data, load_federation
from trellis.errors import DataError, ScenarioError
from trellis_clients import contract
from trellis_clients.trainer import Turn
from trellis_clients.trainers.reinforcement.laplacian_rl import (
    compared,
    eigenvectors,
    penalty,
    prefix_weights,
    second_moment,
)

SCENARIO = Path(__file__).parents[2] / "scenarios" / "trainers" / "laplacian-rl.yaml"
TEXT = """\
name: laplacian
data: {name: gridworld, episodes: 60, test_episodes: 20}
partition: {name: natural-id, test_fraction: 0.1}
trainer: {name: laplacian-rl, collect: 4, capacity: 10}
rounds: {count: 4}
screening: {min_cosine: null, max_norm_ratio: null}
runtime: {grid: local}
"""


def data_of(text: str = TEXT, seed: int = 0):
    return load_data(scenario.from_mapping(scenario.safe_yaml.parse(text, "")), seed)


def turn_of(number: int, client: int = 0) -> Turn:
    return Turn(number, 10, client, 3, torch.Generator().manual_seed(number))


def random(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def laplacian(steps) -> torch.Tensor:
    """D - W of the undirected graph that a batch of pairs makes, as a dense matrix over pairs' means."""
    rate = torch.from_numpy(steps).double() / steps.sum()
    return torch.diag(rate.sum(0) + rate.sum(1)) / 2 - (rate + rate.T) / 2


# -- the world --------------------------------------------------------------------------------------------------------


def test_walks_follow_the_map():
    data = data_of()
    places, walks = data.facts["positions"], data.train.fields["x"].numpy()
    assert walks.shape == (60, 21)
    assert (2, 2) in map(tuple, places.tolist())
    assert (4, 2) not in map(tuple, places.tolist())  # the wall, below the door
    moved = np.abs(np.diff(places[walks], axis=1)).sum(-1)
    assert set(moved.ravel().tolist()) == {0, 1}
    assert data.facts["steps"].sum() == 60 * 20
    assert np.array_equal(data.facts["steps"].sum(1), data.facts["visits"])
    for walk, name in zip(walks, data.natural_id, strict=True):
        assert name == f"region-{places[walk[0], 1] * 3 // 6}"


def test_long_walks_show_the_symmetric_chain():
    data = data_of(TEXT.replace("episodes: 60", "episodes: 4000"))
    steps = data.facts["steps"]
    assert np.abs(data.facts["visits"] / steps.sum() * 29 - 1).max() < 0.1  # everywhere equally often
    assert np.abs(steps - steps.T).max() < 6 * np.sqrt(steps.max())
    values, _ = eigenvectors(steps)
    expected = torch.tensor([0.0, 0.0517, 0.0983, 0.1404], dtype=torch.float64)
    torch.testing.assert_close(values[:4], expected, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "code"),
    [("wall: 5", "gridworld-map"), ("door: 9", "gridworld-map"), ("episodes: 1", "gridworld-visits")],
)
def test_maps_that_cannot_be_are_said(change, code):
    with pytest.raises(DataError) as error:
        data_of(TEXT.replace("episodes: 60", change if "episodes" in change else f"episodes: 60, {change}"))
    assert error.value.code == code


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainer.batch_size=1", "must be 0 .the whole buffer. or at least 2"),
        ("trainer.batch_size=-1", "batch_size"),
        ("strategy=fedadam", "needs strategy 'fedavg', 'fedprox', 'partial', not 'fedadam'"),
    ],
)
def test_what_does_not_go_together_is_said(change, message):
    with pytest.raises(ScenarioError, match=message):
        scenario.load(SCENARIO, ["variants={}", change])


def test_two_pairs_a_step_are_enough():
    trainer, model, _, turn = contract.bench(SCENARIO, ["variants={}", "trainer.batch_size=2"])
    walks = Split.whole(x=torch.arange(21).repeat(5, 1))
    assert all(bool(trainer.loss(model, batch, turn).isfinite()) for batch in trainer.batches(walks, turn))


def test_more_coordinates_than_states_are_said():
    with pytest.raises(ScenarioError, match="29 states"):
        contract.site_of(SCENARIO, ["trainer.dim=30"])


# -- the objective ----------------------------------------------------------------------------------------------------


def test_the_weighted_sum_is_the_sum_over_prefixes():
    phi, pairs = random(40, 5), random(40, 5, seed=1)
    weights = prefix_weights(5, "decreasing").double()
    assert weights.diagonal().tolist() == [5, 4, 3, 2, 1]
    drawn, punished = 0.0, 0.0
    for k in range(1, 6):
        drawn += (phi - pairs)[:, :k].square().sum(1).mean()
        punished += (second_moment(phi[:, :k]) - torch.eye(k)).square().sum()
    torch.testing.assert_close((weights.diagonal() * (phi - pairs).square()).sum(1).mean(), drawn)
    torch.testing.assert_close(penalty(phi, weights, torch.zeros(5, 5), without_diagonal=False), punished)


def test_the_losss_gradient_is_the_closed_form():
    """4 L U c + 4 beta U (C o (U^T D U - I)) on a table, for the pairs of all steps of a buffer."""
    overrides = ["variants={}", "trainer.exchange=weights", "trainer.beta=0.7"]
    trainer, model, _, turn = contract.bench(SCENARIO, overrides)
    federation = load_federation(scenario.load(SCENARIO, overrides), 0)
    episodes = federation.client(1).train
    walks = episodes.fields["x"][episodes.rows]
    batch = next(trainer.batches(episodes, turn))
    model.zero_grad()
    trainer.loss(model, batch, turn).backward()
    steps = np.zeros((29, 29))
    np.add.at(steps, (walks[:, :-1].flatten(), walks[:, 1:].flatten()), 1)
    u, visits = model.body.weight.detach().double(), torch.from_numpy(steps.sum(1) / steps.sum())
    weights = prefix_weights(4, "decreasing").double()
    off = weights * (u.T @ (visits[:, None] * u) - torch.eye(4))
    expected = 4 * laplacian(steps) @ u * weights.diagonal() + 4 * 0.7 * visits[:, None] * u @ off
    torch.testing.assert_close(model.body.weight.grad.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("coefficients", "same"), [("equal", True), ("decreasing", False)])
def test_only_decreasing_coefficients_see_a_rotation(coefficients, same):
    phi, there, q = random(60, 4), random(60, 4, seed=1), torch.linalg.qr(random(4, 4, seed=2))[0]
    weights = prefix_weights(4, coefficients).double()

    def objective(a, b):
        drawn = (weights.diagonal() * (a - b).square()).sum(1).mean()
        return drawn + penalty(a, weights, torch.zeros(4, 4), without_diagonal=False)

    change = float(objective(phi @ q, there @ q) - objective(phi, there))
    assert abs(change) < 1e-9 if same else abs(change) > 1e-2


def test_the_minimiser_is_the_eigenvectors_shortened():
    """Squared lengths 1 - lambda / beta, as the attractive part is 2 u^T L u; directions are the eigenvectors."""
    steps = data_of(TEXT.replace("episodes: 60", "episodes: 2000")).facts["steps"]
    values, _ = eigenvectors(steps)
    visits, beta, weights = torch.from_numpy(steps.sum(1) / steps.sum()), 1.0, prefix_weights(3, "decreasing").double()
    u = (0.3 * random(29, 3)).requires_grad_()
    optimizer = torch.optim.LBFGS([u], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")
    twice = 2 * laplacian(steps)

    def closure():
        optimizer.zero_grad()
        off = u.T @ (visits[:, None] * u) - torch.eye(3)
        value = (weights.diagonal() * (u * (twice @ u)).sum(0)).sum() + beta * (weights * off.square()).sum()
        value.backward()
        return value

    optimizer.step(closure)
    lengths = (visits[:, None] * u.detach().square()).sum(0)
    torch.testing.assert_close(lengths, 1 - values[:3] / beta, rtol=1e-3, atol=0)
    cosines, missed = compared(u.detach(), steps)
    assert float(cosines.min()) > 0.9999
    assert missed < 1e-5


def test_pairs_without_the_diagonal_are_unbiased():
    """Over all samples of three of five states the estimate's mean is the exact penalty of independent draws."""
    phi, weights, correction = random(5, 3), prefix_weights(3, "decreasing").double(), random(3, 3, seed=1) / 5
    draws = torch.cartesian_prod(*[torch.arange(5)] * 3)
    exact = penalty(phi, weights, correction, without_diagonal=False)
    for without, close in ((True, True), (False, False)):
        found = torch.stack([penalty(phi[draw], weights, correction, without_diagonal=without) for draw in draws])
        assert torch.allclose(found.mean(), exact) is close


def test_comparison_knows_signs_order_and_space():
    steps = data_of(TEXT.replace("episodes: 60", "episodes: 500")).facts["steps"]
    vectors = eigenvectors(steps)[1]
    cosines, missed = compared(vectors[:, :4] * torch.tensor([-2.0, 1.0, 3.0, -1.0]), steps)
    torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64))
    assert abs(missed) < 1e-9
    cosines, missed = compared(vectors[:, [0, 2, 1, 3]], steps)
    assert cosines.round(decimals=6).tolist() == [1, 0, 0, 1]
    assert abs(missed) < 1e-9
    assert compared(vectors[:, [0, 1, 2, 9]], steps)[1] == pytest.approx(0.25)


def test_geometric_steps_end_with_the_episode():
    trainer, _, _, turn = contract.bench(SCENARIO, ["variants={}", "trainer.discount=0.9", "trainer.batch_size=4000"])
    walks = torch.arange(21).repeat(5, 1)  # a state's number is its time
    batch = next(trainer.batches(Split.whole(x=walks), turn))
    gaps = batch.fields["next"] - batch.x
    assert int(gaps.min()) == 1
    early = gaps[batch.x == 0].double()
    assert float(early.mean()) == pytest.approx((1 - 0.9**20) / 0.1, rel=0.15)
    assert int(batch.fields["next"].max()) == 20


# -- the federation ---------------------------------------------------------------------------------------------------


def test_the_buffer_takes_new_episodes_and_lets_old_ones_go():
    trainer = contract.site_of(SCENARIO, ["variants={}", "trainer.collect=4", "trainer.capacity=10"]).trainer
    recordings, state = Split.whole(x=torch.arange(21)[None] + torch.arange(18)[:, None]), {}
    first = [trainer.record(recordings, state)[:, 0].tolist() for _ in range(6)]
    assert first[0] == [0, 1, 2, 3]
    assert first[2] == list(range(2, 12))
    assert first[5] == first[4] == list(range(8, 18))
    assert state["recorded"] == 18


@pytest.mark.parametrize(
    ("exchange", "names"), [("both", {"body.weight", "moment"}), ("weights", {"body.weight"}), ("moments", {"moment"})]
)
def test_what_is_sent(exchange, names):
    """The buffer stays in the client's state."""
    site, state = contract.site_of(SCENARIO, ["variants={}", f"trainer.exchange={exchange}"]), {}
    received = {name: torch.from_numpy(array.numpy().copy()) for name, array in site.initial().items()}
    reply = site.train(replace(turn_of(1), received={"arrays": received}), state)
    assert set(reply) == {"arrays", "metrics"}
    assert set(reply["arrays"]) == names
    assert "buffer" in state


def test_a_client_that_sat_a_round_out_corrects_by_what_it_holds_now():
    """What it sent earlier was at other weights, and is not in the mean of the round before."""
    site, state = contract.site_of(SCENARIO, ["variants={}"]), {}
    data, model, mean = site.federation.client(0), site.model, random(4, 4).float()
    sent = {}
    for number, before in ((1, 1), (2, 1), (4, 4), (5, 4)):
        walks = site.trainer.record(data.train, dict(state))
        with torch.no_grad():
            model.moment.copy_(mean)
            now = second_moment(model(walks[:, :-1].flatten()))
        sent[number] = now
        site.trainer.fit(model, data, state, turn_of(number))
        torch.testing.assert_close(model.correction, mean - sent[before])
        torch.testing.assert_close(model.moment, now)
    assert (sent[4] - sent[2]).abs().max() > 1e-3


def test_one_local_step_is_a_step_on_the_union(tmp_path):
    """With all in the buffers phi moves by the union's gradient, at second moments whose others' part is a round old.

    Three rounds by hand, in float64, momentum and all; clients have unequal numbers of steps.
    """
    text = TEXT.replace("collect: 4, capacity: 10", "local_steps: 1, momentum: 0.5, lr: 0.3")
    current, outcome = run(tmp_path, ("rounds.count=3",), text)
    from safetensors.torch import load_file

    final = load_file(current.path / "cells/main-seed0/model.safetensors")
    each = scenario.expand(current.scenario)[0][1]
    federation = load_federation(each, 0)
    site = contract.site_of(tmp_path / "digits.yaml")
    u = site.model.body.weight.detach().double()
    moment, weights, beta = site.model.moment.double(), prefix_weights(4, "decreasing").double(), 0.5
    parts = []
    for client in range(federation.num_clients):
        walks = federation.client(client).train.fields["x"][federation.client(client).train.rows]
        steps = np.zeros((29, 29))
        np.add.at(steps, (walks[:, :-1].flatten(), walks[:, 1:].flatten()), 1)
        parts.append(steps)
    sizes = [part.sum() for part in parts]
    assert len(set(sizes)) > 1
    shares = [size / sum(sizes) for size in sizes]
    visits = [torch.from_numpy(part.sum(1) / part.sum()) for part in parts]
    sent, velocity = None, torch.zeros_like(u)
    for _ in range(3):
        own = [u.T @ (v[:, None] * u) for v in visits]
        gradient = torch.zeros_like(u)
        for client, share in enumerate(shares):
            known = moment + own[client] - (own if sent is None else sent)[client]
            pull = 4 * laplacian(parts[client]) @ u * weights.diagonal()
            gradient += share * (pull + 4 * beta * visits[client][:, None] * u @ (weights * (known - torch.eye(4))))
        moment, sent = sum(share * m for share, m in zip(shares, own, strict=True)), own
        velocity = 0.5 * velocity + gradient
        u = u - 0.3 * velocity
    assert not outcome.failed
    torch.testing.assert_close(final["body.weight"].double(), u, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final["moment"].double(), moment, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exchange", ["both", "weights", "moments"])
def test_a_run_resumes_to_the_same_bits(tmp_path, exchange):
    text = TEXT.replace("collect: 4", f"collect: 4, batch_size: 32, discount: 0.5, exchange: {exchange}")
    assert resumed(tmp_path, text) == sha(tmp_path, text=text)


def test_weights_that_stay_are_judged_on_the_clients(tmp_path):
    current, _ = run(tmp_path, ("trainer.exchange=moments", "rounds.count=2"), TEXT)
    last = lines(current)[-1]
    assert set(last["central"]) == {"moment-error"}
    assert last["federated"]["similarity"] > 0
    rows = [row for row in lines(current, "clients.jsonl") if row["phase"] == "evaluate" and row["round"] == 2]
    assert len({row["metrics"]["similarity"] for row in rows}) == 3  # each has its own


@pytest.mark.parametrize("change", [["trainer.exchange=moments"], ["trainer.hidden=[16]", "trainer.lr=0.005"]])
def test_contract(change):
    contract.check(SCENARIO, ["variants={}", *change])


def test_a_batch_of_pairs_is_drawn_from_the_turns_generator():
    trainer, _, _, turn = contract.bench(SCENARIO, ["variants={}", "trainer.batch_size=16"])
    walks = Split.whole(x=torch.arange(210).view(10, 21))
    first = [batch.x.tolist() for batch in trainer.batches(walks, turn)]
    again = replace(turn, generator=torch.Generator().manual_seed(1))
    other = replace(turn, generator=torch.Generator().manual_seed(1))
    assert len(first) == 4
    draws = [[batch.x.tolist() for batch in trainer.batches(walks, t)] for t in (again, other)]
    assert draws[0] == draws[1] != first
