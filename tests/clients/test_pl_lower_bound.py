"""The hard function's exact properties, methods against textbook forms, and rounds as oracle calls."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from federations import lines, run, sha
from test_bits import resumed
from trellis import progress, report, scenario
from trellis.data.base import ClientData, Split
from trellis.errors import ScenarioError
from trellis.report import figures, reading
from trellis_clients import contract
from trellis_clients.trainer import Task, Turn
from trellis_clients.trainers.theory.pl_lower_bound import (
    PL_CONSTANT,
    RATIO,
    SMOOTHNESS,
    PlLowerBound,
    curvatures,
    hard_terms,
    least_value,
    separable,
    targets,
)

SCENARIO = Path(__file__).parents[2] / "scenarios" / "trainers" / "pl-lower-bound.yaml"
TEXT = """\
name: pl
data: none
clients: 3
trainer: {name: pl-lower-bound, block_length: 5, blocks: 3, method: nesterov}
rounds: {count: 4}
runtime: {grid: local}
"""
SPAN = ("gd", "heavy-ball", "nesterov", "nesterov-increasing")


def trainer(**config) -> PlLowerBound:
    task = Task("none", (), (), {}, torch.nn.Identity, 0, torch.device("cpu"))
    return PlLowerBound(PlLowerBound.Config(**config), task)


def turn_of(client: int = 0, clients: int = 1) -> Turn:
    return Turn(1, 1, client, clients, torch.Generator())


def gradient(x: torch.Tensor, length: int) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(hard_terms(x, length).sum(), x)
    return found


def path(method: str, calls: int, **config) -> list[torch.Tensor]:
    """Return the points that a method asks about, from the start on, on the whole function."""
    t = trainer(method=method, dealt="whole", **config)
    model, empty, state, points = t.build(), Split.whole(x=torch.empty(0)), {}, []
    for _ in range(calls):
        points.append(model.x.detach().clone())
        t.fit(model, ClientData(0, empty, empty), state, turn_of())
    return points


def test_the_separable_part_is_once_differentiable_and_rests_at_its_target():
    y = torch.tensor([1.0, 0.3, (7 / 8) ** 12], dtype=torch.float64)
    x = y.clone().requires_grad_()
    (slope,) = torch.autograd.grad(separable(x, y).sum(), x)
    assert torch.equal(slope, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(separable(y, y), 31 / 64 * y.square())
    for joint in (31 / 32, 1.0, 33 / 32):
        ends = [(joint * y + sign * 1e-9 * y).requires_grad_() for sign in (-1, 1)]
        values = [separable(end, y) for end in ends]
        slopes = [torch.autograd.grad(v.sum(), end)[0] for v, end in zip(values, ends, strict=True)]
        torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-6)


def test_values_and_gradients_against_the_papers_pieces_and_differences():
    """v by its four pieces as they are published, the chain by its double sum."""
    generator = np.random.default_rng(0)
    y = targets(4, 3).numpy()
    for scale in (0.02, 0.3, 2.0):
        x = y + scale * generator.standard_normal(12)
        expected = 0.0
        for i in range(12):
            before = 0.0 if i == 0 else x[i - 1]
            expected += ((RATIO if i % 4 == 0 else 1.0) * before - x[i]) ** 2 / 2
            low, high, half = 31 * y[i] / 32, 33 * y[i] / 32, x[i] ** 2 / 2
            if x[i] <= low:
                expected += half
            elif x[i] <= y[i]:
                expected += half - 16 * (x[i] - low) ** 2
            elif x[i] <= high:
                expected += half - y[i] ** 2 / 32 + 16 * (x[i] - high) ** 2
            else:
                expected += half - y[i] ** 2 / 32
        point = torch.from_numpy(x)
        assert float(hard_terms(point, 4).sum()) == pytest.approx(expected, rel=1e-12)
        steps = torch.eye(12, dtype=torch.float64) * 1e-6
        slopes = [float((hard_terms(point + s, 4) - hard_terms(point - s, 4)).sum()) / 2e-6 for s in steps]
        np.testing.assert_allclose(gradient(point, 4).numpy(), slopes, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("length", "blocks"), [(1, 25), (5, 3), (10, 6)])
def test_no_gradient_reaches_more_than_one_coordinate_further(length, blocks):
    y, generator = targets(length, blocks), torch.Generator().manual_seed(0)
    assert gradient(y, length).nonzero().tolist() == [[0]]
    for moved in range(len(y)):
        x = y.clone()
        x[:moved] += torch.randn(moved, generator=generator, dtype=torch.float64)
        assert not gradient(x, length)[moved + 1 :].any()
    assert float(hard_terms(y, length).sum()) <= 3 * length
    assert float(hard_terms(torch.zeros_like(y), length).sum()) == 0


def around(y: torch.Tensor, count: int) -> torch.Tensor:
    """Return points at distances from the targets of all orders between 0.001 and 1, ``(count, n)``."""
    scales = torch.logspace(-3, 0, count, dtype=y.dtype)[:, None]
    return y + scales * torch.randn(count, len(y), generator=torch.Generator().manual_seed(0), dtype=y.dtype)


def test_it_is_37_smooth():
    """By the Hessian's eigenvalues: they come close to 37, and none is larger in size."""
    hessian = torch.func.vmap(torch.func.hessian(lambda x: hard_terms(x, 5).sum()))
    largest = torch.linalg.eigvalsh(hessian(around(targets(5, 3), 2000))).abs().amax()
    assert 36 < float(largest) <= SMOOTHNESS


@pytest.mark.parametrize("length", [5, 10, 20])
def test_the_pl_constant_falls_as_one_over_the_block_length(length):
    """min ||grad||^2 / 2f along gradient descent and at 20,000 points around: 0.42 / T within 5 %."""
    walked = torch.stack(path("gd", 40 * length, block_length=length, blocks=3))
    points = torch.cat([walked, around(targets(length, 3), 20_000)])
    slopes, values = torch.func.vmap(torch.func.grad_and_value(lambda x: hard_terms(x, length).sum()))(points)
    assert float((slopes.square().sum(1) / (2 * values)).min()) * length == pytest.approx(PL_CONSTANT, rel=0.05)


@pytest.mark.parametrize("method", [*SPAN, "adam"])
def test_no_method_gets_below_the_bound(method):
    y = targets(5, 4)
    for calls, x in enumerate(path(method, 20, block_length=5, blocks=4)):
        assert torch.equal(x[calls:], y[calls:])
        assert float(hard_terms(x, 5).sum()) >= float(least_value(y, calls))


def test_methods_are_their_textbook_forms():
    config = {"function": "quadratic", "block_length": 4, "blocks": 2}
    curvature = curvatures(8, SMOOTHNESS * 4 / PL_CONSTANT)
    assert float(curvature[-1]) == pytest.approx(SMOOTHNESS)
    assert float(curvature[0]) == pytest.approx(PL_CONSTANT / 4)
    root = math.sqrt(SMOOTHNESS * 4 / PL_CONSTANT)
    beta, step = (root - 1) / (root + 1), 1 / SMOOTHNESS
    start = curvature.rsqrt()

    def nesterov(momentum):
        x, asked, points = start, start, []
        for k in range(1, 21):
            points.append(asked)
            new = asked - step * curvature * asked
            asked = new + momentum(k) * (new - x)
            x = new
        return points

    def heavy_ball():
        before, x, points = start, start, []
        for _ in range(20):
            points.append(x)
            before, x = x, x - step * curvature * x + beta * (x - before)
        return points

    expected = {
        "gd": [start * (1 - step * curvature) ** k for k in range(20)],
        "heavy-ball": heavy_ball(),
        "nesterov": nesterov(lambda _: beta),
        "nesterov-increasing": nesterov(lambda k: (k - 1) / (k + 2)),
    }
    for method in SPAN:
        torch.testing.assert_close(path(method, 20, **config), expected[method], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("local_steps", [1, 50])
@pytest.mark.parametrize("method", [*SPAN, "adam"])
def test_calls_are_counted_up_to_the_first_hit_and_no_further(method, local_steps):
    """Twenty calls and more beyond it as well, where a method that is not monotone leaves the tolerance again."""
    config = {"block_length": 10, "blocks": 6}
    values = [float(hard_terms(x, 10).sum()) for x in path(method, 300, **config)]
    goal = 0.01 * values[0]
    expected = next(k for k, value in enumerate(values) if value <= goal)
    if method == "heavy-ball":
        assert expected == 184
        assert max(values[expected : expected + 20]) > goal
    t = trainer(**config, method=method, dealt="whole", local_steps=local_steps)
    model, empty, state = t.build(), Split.whole(x=torch.empty(0)), {}
    for _ in range(-(-(expected + 20) // local_steps)):
        metrics = t.fit(model, ClientData(0, empty, empty), state, turn_of())
    assert metrics["oracle-calls"] == float(model.calls) == expected


def test_what_travels_and_under_which_strategies():
    assert set(contract.site_of(SCENARIO).names) == {"x", "calls", "reached"}
    with pytest.raises(ScenarioError, match="needs strategy 'fedavg', 'fedprox', 'partial', not 'fedadam'"):
        scenario.load(SCENARIO, ["variants={}", "strategy=fedadam"])


@pytest.mark.parametrize("dealt", ["contiguous", "interleaved"])
@pytest.mark.parametrize("function", ["hard", "quadratic"])
def test_the_clients_terms_have_the_function_as_their_mean(dealt, function):
    t = trainer(dealt=dealt, function=function, block_length=5, blocks=3)
    x = t.start() + torch.randn(15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [t.value(x, t.terms(turn_of(client, 4))) for client in range(4)]
    torch.testing.assert_close(sum(parts) / 4, t.value(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", SPAN)
def test_a_federation_of_parts_walks_the_path_of_the_whole(tmp_path, method):
    """Momentum is on the clients, so this holds only if it lives from round to round."""
    for dealt in ("contiguous", "interleaved"):
        current, _ = run(tmp_path, (f"trainer.method={method}", f"trainer.dealt={dealt}", "rounds.count=12"), TEXT)
        losses = [line["central"]["loss"] for line in lines(current)]
        points = path(method, 13, block_length=5, blocks=3)
        np.testing.assert_allclose(losses, [float(hard_terms(x, 5).sum()) for x in points], rtol=1e-9)
        uncovered = [line["central"]["coordinates"] for line in lines(current)]
        assert uncovered[:9] == list(range(9))  # then the first motion, (1/37)^k, is lost in the coordinate's last bit
        assert all(coordinates <= calls for calls, coordinates in enumerate(uncovered))


@pytest.mark.parametrize(("dealt", "most"), [("contiguous", 5), ("interleaved", 1)])
def test_local_steps_go_further_only_where_a_client_holds_the_next_term(tmp_path, dealt, most):
    current, _ = run(tmp_path, (f"trainer.dealt={dealt}", "trainer.local_steps=5", "trainer.method=gd"), TEXT)
    rows = [line["central"] for line in lines(current)]
    uncovered = [row["coordinates"] for row in rows]
    assert uncovered[1] == most
    for number, row in enumerate(rows):
        assert row["coordinates"] <= 5 * number == row["oracle-calls"]
        assert row["gap"] >= row["bound"] >= 0
    assert dealt == "contiguous" or uncovered == list(range(5))


def test_a_run_resumes_to_the_same_bits(tmp_path):
    assert resumed(tmp_path, TEXT) == sha(tmp_path, text=TEXT)


@pytest.mark.parametrize("method", [*SPAN, "adam"])
def test_contract(method):
    contract.check(SCENARIO, ["variants={}", f"trainer.method={method}"])


def test_terminal_and_report_speak_of_oracle_calls(tmp_path):
    from rich.console import Console

    current, outcome = run(tmp_path, (), TEXT)
    page = report.build(current.path).read_text()
    assert "oracle-calls" in page
    assert "accuracy" not in page
    cells = reading.read(current.path).cells
    assert figures.main_metric(cells) == ("central", "oracle-calls")
    assert figures.lower_is_better(cells, "oracle-calls")
    assert not figures.lower_is_better(cells, "coordinates")
    console = Console(record=True, width=120)
    progress.Live(console, current).summary(outcome)
    table = console.export_text()
    assert "oracle-calls" in table
    assert "accuracy" not in table
