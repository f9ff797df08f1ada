"""A function on which no first-order method beats gradient descent by more than a constant: count the gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from trellis.data.base import Batch, ClientData, Split
from trellis.registry import register
from trellis.scenario import Strict
from trellis_clients.trainer import Metrics, State, Trainer, Turn

RATIO = 7 / 8
"""What a coordinate's target is in the next block, and how strongly a block hangs on the one before it."""
SMOOTHNESS = 37.0
"""L of the hard function: at most 33 of the separable part and 4 of the chain."""
PL_CONSTANT = 0.42
"""mu times the block length: measured, see the tests; the paper says that mu is of the order of 1/T."""

Count = Annotated[int, Field(ge=1)]
OPTIMIZER = "optimizer"
"""Key of a client's state: what its method remembers from call to call."""


class Point(nn.Module):
    """The iterate, and what it has cost.

    Attributes:
        x: ``(n,)``, float64, as the function's scale falls by (7/8)^2 a block.
        calls: oracle calls of one client up to the first point within the tolerance; a number.
        reached: 1 once a point was within the tolerance, before that 0. Without it a method whose values rise and fall
            would be charged again whenever it leaves the tolerance.
    """

    calls: Tensor
    reached: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(start)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("reached", torch.zeros((), dtype=torch.float64))


class Terms(NamedTuple):
    """The part of an objective that a client holds: one number a coordinate, 0 where the term is another's."""

    share: Tensor


@register(
    "trainers",
    "pl-lower-bound",
    summary="oracle calls of first-order methods on a hard Polyak-Lojasiewicz function; no data",
    paper="arXiv 2212.13551",
    takes=("none",),
    sends="weights",
    payload="the point, the count of oracle calls",
    strategies=("fedavg", "fedprox", "partial"),
)
class PlLowerBound(Trainer):
    """Yue, Fang and Lin, "On the Lower Bound of Minimizing Polyak-Lojasiewicz Functions", COLT 2023.

    Under ||grad f||^2 >= 2 mu (f - f*) gradient descent needs of the order of (L/mu) log(1/eps) gradients. The paper
    builds an L-smooth function on which every first-order method needs as many, so that momentum, worth a square root
    under strong convexity, is worth a constant at best. Here are that function (``hard``), a strongly convex quadratic
    of the same L and mu for contrast (``quadratic``), and methods that pay one call for each gradient: ``gd`` with
    step 1/L, ``heavy-ball`` and ``nesterov`` with momentum (sqrt(L/mu) - 1) / (sqrt(L/mu) + 1),
    ``nesterov-increasing`` with (k - 1) / (k + 2) in step k, and ``adam``. The result is ``oracle-calls``: how many it
    took to bring f to ``tolerance`` times its first value; the run's length where it did not.

    The model is the point x. In a federation mean_i f_i = f: with ``dealt: whole`` every client holds f; otherwise f's
    terms are dealt out, in runs of neighbouring coordinates (``contiguous``) or in turn (``interleaved``), each f_i
    being the clients' number times its own terms. Momentum is private and lives in the client's state. All methods but
    Adam are linear in gradients, so one local step of each client and plain averaging make one step of the method
    on f (up to the last bits), and R rounds uncover at most R coordinates. Local steps on contiguous terms go further
    in a round, which the bound does not forbid: it counts calls. Where terms are interleaved a round cannot uncover
    more than one coordinate however long clients work on their own.

    The construction follows what the lower bound needs (smoothness, zero chain, mu of the order of 1/T, all tested);
    its symbols and constants were not compared with the paper's text. Not here: conjugate gradients and BFGS, which the
    bound covers as well, and the random rotation that extends it beyond methods of the gradients' span (Adam is not of
    that span, but leaves coordinates without a gradient where they are). The count, and whether it has ended, travel in
    the model as two more numbers, equal on all clients. A server that does more than average bends them, and x too.
    """

    metric = ("oracle-calls", "min")

    class Config(Strict):
        function: Literal["hard", "quadratic"] = "hard"
        method: Literal["gd", "heavy-ball", "nesterov", "nesterov-increasing", "adam"] = "gd"
        block_length: Count = Field(10, description="T, coordinates a block; L/mu is about 88 T")
        blocks: Count = Field(6, description="t; the dimension is t T")
        dealt: Literal["whole", "contiguous", "interleaved"] = Field(
            "contiguous", description="which of the function's terms a client holds"
        )
        local_steps: Count = Field(1, description="oracle calls a turn")
        tolerance: Annotated[float, Field(gt=0, lt=1)] = Field(0.01, description="share of the first value to reach")
        adam_lr: Annotated[float, Field(gt=0)] = 0.01

    config: Config

    # -- the objective --------------------------------------------------------------------------------

    @property
    def condition(self) -> float:
        """L / mu."""
        return SMOOTHNESS * self.config.block_length / PL_CONSTANT

    def start(self) -> Tensor:
        """Return the first point: y, the hard function's false resting point; equal values in the quadratic's terms."""
        length, blocks = self.config.block_length, self.config.blocks
        if self.config.function == "hard":
            return targets(length, blocks)
        return curvatures(length * blocks, self.condition).rsqrt()

    def value(self, x: Tensor, terms: Terms | None = None) -> Tensor:
        """Return f(x), or the part of f that consists of some terms."""
        if self.config.function == "hard":
            each = hard_terms(x, self.config.block_length)
        else:
            each = x.square() / 2 * curvatures(len(x), self.condition).to(x)
        return each.sum() if terms is None else (each * terms.share).sum()

    def terms(self, turn: Turn) -> Terms | None:
        """Return the client's terms, scaled so that the mean over clients is f; None for all of them."""
        n, clients = self.config.block_length * self.config.blocks, turn.num_clients
        if self.config.dealt == "whole" or turn.client < 0:
            return None
        places = torch.arange(n, device=self.task.device)
        owner = places % clients if self.config.dealt == "interleaved" else places * clients // n
        return Terms((owner == turn.client).double() * clients)

    # -- the hooks ------------------------------------------------------------------------------------

    def build(self) -> Point:
        return Point(self.start())

    def shared(self, model: nn.Module) -> dict[str, Tensor]:
        return dict(model.state_dict())

    def batches(self, split: Split, turn: Turn) -> Iterator[Batch]:  # noqa: ARG002
        """Yield an empty batch for every oracle call of a turn."""
        for _ in range(self.config.local_steps):
            yield Batch({}, torch.empty(0, dtype=torch.int64))

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:  # noqa: ARG002
        assert isinstance(model, Point)
        return self.value(model.x, self.terms(turn))

    def optimizer(self, model: nn.Module, turn: Turn) -> torch.optim.Optimizer:  # noqa: ARG002
        method, parameters = self.config.method, list(model.parameters())
        if method == "adam":
            return torch.optim.Adam(parameters, lr=self.config.adam_lr)
        if method == "nesterov-increasing":
            return IncreasingNesterov(parameters, lr=1 / SMOOTHNESS)
        root = math.sqrt(self.condition)
        momentum = 0.0 if method == "gd" else (root - 1) / (root + 1)
        return torch.optim.SGD(parameters, lr=1 / SMOOTHNESS, momentum=momentum, nesterov=method == "nesterov")

    def fit(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        """Ask the oracle ``local_steps`` times, going on with the method where the client's last turn left it."""
        assert isinstance(model, Point)
        optimizer = self.optimizer(model, turn)
        if OPTIMIZER in state:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state[OPTIMIZER]})
        goal = self.config.tolerance * float(self.value(self.start()))
        total = 0.0
        for number, batch in enumerate(self.batches(data.train, turn)):
            # Whoever holds only some terms cannot see f fall before the others' steps are averaged in.
            if not model.reached and (number == 0 or self.config.dealt == "whole"):
                model.reached.fill_(float(self.value(model.x.detach())) <= goal)
            model.calls += not model.reached
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss(model, batch, turn)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(loss.detach())
        state[OPTIMIZER] = optimizer.state_dict()["state"]
        return {"loss": total / self.config.local_steps, "oracle-calls": float(model.calls)}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split, turn: Turn, batch_size: int = 256) -> Metrics:  # noqa: ARG002
        """Return ``oracle-calls``, ``gap`` (f over its first value), ``coordinates`` moved, and ``loss``, f itself.

        For the hard function also ``bound``, the least gap that so many coordinates allow.
        """
        assert isinstance(model, Point)
        start = self.start().to(model.x)
        first = float(self.value(start))
        found = float(self.value(model.x))
        moved = (model.x != start).nonzero()
        uncovered = int(moved.max()) + 1 if len(moved) else 0
        metrics = {"oracle-calls": float(model.calls), "gap": found / first, "coordinates": uncovered, "loss": found}
        if self.config.function == "hard":
            metrics["bound"] = float(least_value(start, uncovered)) / first
        return metrics


def targets(length: int, blocks: int) -> Tensor:
    """Return y, ``(blocks * length,)`` in float64: (7/8)^k throughout block k."""
    scales = [1.0]
    for _ in range(blocks - 1):
        scales.append(scales[-1] * RATIO)  # as the chain multiplies, so that its residuals at y are zero to the bit
    return torch.tensor(scales, dtype=torch.float64).repeat_interleave(length)


def hard_terms(x: Tensor, length: int) -> Tensor:
    """Return the hard function's terms, ``(n,)``: for each coordinate its link to the one before, and its own v."""
    y = targets(length, len(x) // length).to(x)
    before = torch.cat([x.new_zeros(1), x[:-1]])
    weight = torch.where(torch.arange(len(x), device=x.device) % length == 0, RATIO, 1.0)
    return (weight * before - x).square() / 2 + separable(x, y)


def separable(x: Tensor, y: Tensor) -> Tensor:
    """Return v_y(x): x^2/2, bent near y so that y is a resting point. Once differentiable; |v''| is at most 33.

    Around y it is written by the distance u = x - y, whose derivative there is exactly zero.
    """
    u = x - y
    left, right = 31 / 64 * y.square() - 31 / 2 * u.square(), 31 / 64 * y.square() + 33 / 2 * u.square()
    outer = torch.where(u < 0, x.square() / 2, x.square() / 2 - y.square() / 32)
    return torch.where(u.abs() > y / 32, outer, torch.where(u <= 0, left, right))


def least_value(y: Tensor, uncovered: int) -> Tensor:
    """Return the hard function's least value while coordinates from ``uncovered`` on are at their targets."""
    return 31 / 64 * y[uncovered:].square().sum()


def curvatures(n: int, condition: float) -> Tensor:
    """Return the quadratic's curvatures, ``(n,)``: evenly spaced on a log scale from mu = L / condition to L."""
    ends = math.log10(SMOOTHNESS / condition), math.log10(SMOOTHNESS)
    return torch.logspace(*ends, n, dtype=torch.float64)


class IncreasingNesterov(torch.optim.Optimizer):
    """Nesterov's method with momentum (k - 1) / (k + 2) in step k = 1, 2, ...; parameters are the points asked about.

    Each is x_k + (k-1)/(k+2) (x_k - x_{k-1}), where x_k is the last one less ``lr`` times its gradient.
    """

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                kept = self.state[p]
                k = kept["step"] = kept.get("step", 0) + 1
                x = p - group["lr"] * p.grad
                p.copy_(x + (k - 1) / (k + 2) * (x - kept.get("x", x)))
                kept["x"] = x
