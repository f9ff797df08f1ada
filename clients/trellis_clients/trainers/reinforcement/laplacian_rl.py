"""Generalised graph drawing: the eigenvectors of an environment's Laplacian, in order, as a state's coordinates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from trellis.data.base import Batch, ClientData, Split
from trellis.errors import ScenarioError
from trellis.registry import register
from trellis.scenario import Strict
from trellis_clients.trainer import Metrics, State, Task, Trainer, Turn

BUFFER, RECORDED, SENT, SENT_IN, OPTIMIZER = "buffer", "recorded", "sent", "sent_in", "optimizer"
"""Keys of a client's state: its episodes ``(n, length + 1)``, how many it has ever recorded, the second moment of its
own states as it last sent it ``(d, d)``, the round in which it did, its momentum."""

Count = Annotated[int, Field(ge=1)]


def _pairs(size: int) -> int:
    if size == 1:  # a step's penalty takes a sample's diagonal out, which leaves nothing of one pair
        raise ValueError("must be 0 (the whole buffer) or at least 2")
    return size


class Drawing(nn.Module):
    """The representation phi, from a state's number to d coordinates, and what is known of its second moment.

    Attributes:
        moment: ``(d, d)``, E[phi phi^T] over all clients' states, at the weights of the round before.
        correction: ``(d, d)``, that less the client's own, in its turn; 0 where moments are not exchanged.
    """

    positions: Tensor
    moment: Tensor
    correction: Tensor

    def __init__(self, positions: Tensor, dim: int, hidden: tuple[int, ...], scale: float) -> None:
        super().__init__()
        widths = (2, *hidden)
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
        self.body = nn.Sequential(*layers, nn.Linear(widths[-1], dim)) if hidden else nn.Embedding(len(positions), dim)
        if isinstance(self.body, nn.Embedding):
            nn.init.normal_(self.body.weight, std=scale)
        half = positions.float().amax(0).clamp(min=1) / 2
        self.register_buffer("positions", positions / half - 1, persistent=False)
        self.register_buffer("moment", torch.empty(dim, dim))
        self.register_buffer("correction", torch.zeros(dim, dim))
        with torch.no_grad():
            self.moment.copy_(second_moment(self(torch.arange(len(positions)))))

    def forward(self, states: Tensor) -> Tensor:
        """Return coordinates ``(n, d)`` of states ``(n,)``."""
        coordinates: Tensor = self.body(states if isinstance(self.body, nn.Embedding) else self.positions[states])
        return coordinates


@register(
    "trainers",
    "laplacian-rl",
    summary="generalised graph drawing: ordered Laplacian eigenvectors from random walks",
    paper="arXiv 2107.05545",
    takes=("transitions",),
    sends="weights",
    payload="weights, second moments",
    strategies=("fedavg", "fedprox", "partial"),
)
class LaplacianRl(Trainer):
    """Wang et al., "Towards Better Laplacian Representation in Reinforcement Learning with Generalized Graph Drawing".

    The coordinates minimise sum_i c_i E[(phi_i(s) - phi_i(s'))^2] over steps (s, s') under E[phi phi^T] = I. With
    c_i = d - i + 1 (``coefficients: decreasing``, the paper's) the minimiser is unique up to signs, the eigenvectors in
    order; with equal ones (the earlier graph drawing, the baseline) any rotation of them is as good. As the weighted
    sum is the sum over all prefixes of the coordinates, so is the penalty that stands in for the constraint:
    sum_k ||E[phi_1..k phi_1..k^T] - I_k||^2, weighted by beta. Pairs are one step apart, or by a geometric number of
    steps with parameter 1 - ``discount``, cut off at the episode's end. phi is a table of the states, or with
    ``hidden`` a small network on the position; nothing is detached.

    A client plays ``collect`` further episodes of its recordings into its replay buffer each turn; the buffer, the
    last ``capacity`` of them, is private and lives in its state, as does the momentum.

    ``exchange`` says what the clients exchange:

    - ``both``: the weights, and d x d second moments with them. E[phi phi^T] of a client's own states is not that of
      the union, and to make each the identity is another problem than the one to solve. So a client's penalty is on
      its own moment plus a correction: the mean of all clients' (weighted by their buffers) less its own, both at the
      weights of the round before (one that sat it out takes its own at the weights it is sent now). Where the rounds
      come to rest, that is the penalty of the union.
    - ``weights``: weights alone; each client's penalty is on its own states.
    - ``moments``: second moments in place of weights, which stay on the client. All start from the cloud's weights,
      without which signs would differ. It is here to be measured: no edge joins one client's graph to another's, so
      the constraint on the mean alone is met best by drawings that are constant on each client, with a first moment
      that differs between them.

    What differs: the paper's settings are known from a reproduction alone (d = 10, Adam at 0.001, 200,000 steps); here
    SGD with momentum, which a federation averages exactly, and maps of some thirty states, solved in 800 steps. With
    ``batch_size: 0`` a step sees the whole buffer; otherwise pairs are drawn, and the square of the client's own moment
    is estimated from pairs of different draws, as a draw paired with itself would bias it. The moments are means, so
    that the strategies to pair this with are those that average.

    Metrics compare with the eigenvectors of the graph of the data set's training steps, also those that clients hold
    back for their own evaluation: ``similarity`` is the mean cosine, by coordinates and without sign,
    ``similarity-rest`` leaves out the first (which is constant), and ``subspace`` is the share of the right space that
    is missed.
    """

    metric = ("similarity", "max")

    class Config(Strict):
        dim: Count = Field(4, description="coordinates d")
        coefficients: Literal["decreasing", "equal"] = "decreasing"
        beta: Annotated[float, Field(gt=0)] = Field(0.5, description="of the penalty; above the d-th eigenvalue")
        discount: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="0 pairs neighbours; 0.9 in the paper")
        exchange: Literal["both", "weights", "moments"] = "both"
        hidden: tuple[Count, ...] = Field((), description="layers of a network on positions; none: a table")
        scale: Annotated[float, Field(gt=0)] = Field(0.3, description="deviation of the table's first values")
        lr: Annotated[float, Field(gt=0)] = Field(0.4, description="for a table; 0.005 for a network")
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
        local_steps: Count = 4
        batch_size: Annotated[int, Field(ge=0), AfterValidator(_pairs)] = Field(
            0, description="pairs a step, at least 2; 0: the whole buffer"
        )
        capacity: Count = Field(200, description="episodes in a client's replay buffer")
        collect: Count = Field(50, description="episodes that a turn adds to it")

    config: Config

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task)
        if config.dim > len(task.facts["visits"]):
            raise ScenarioError(
                "laplacian-dimension", f"trainer.dim is {config.dim}, but there are {len(task.facts['visits'])} states"
            )

    # -- the model ------------------------------------------------------------------------------------

    def build(self) -> Drawing:
        positions = torch.from_numpy(np.asarray(self.task.facts["positions"]))
        return Drawing(positions, self.config.dim, self.config.hidden, self.config.scale)

    def kept(self, model: nn.Module) -> set[str]:
        return set(model.state_dict()) - {"moment", "correction"} if self.config.exchange == "moments" else set()

    def shared(self, model: nn.Module) -> dict[str, Tensor]:
        private = self.kept(model) | {"correction"} | ({"moment"} if self.config.exchange == "weights" else set())
        return {name: values for name, values in model.state_dict().items() if name not in private}

    # -- training -------------------------------------------------------------------------------------

    def optimizer(self, model: nn.Module, turn: Turn) -> torch.optim.Optimizer:  # noqa: ARG002
        return torch.optim.SGD(model.parameters(), lr=self.config.lr, momentum=self.config.momentum)

    def batches(self, split: Split, turn: Turn) -> Iterator[Batch]:
        """Yield ``local_steps`` batches of pairs, fields ``x`` and ``next``, out of a split of episodes."""
        episodes = split.fields["x"][split.rows]
        length, count = episodes.shape[1] - 1, self.config.batch_size or episodes.shape[0] * (episodes.shape[1] - 1)
        for _ in range(self.config.local_steps):
            at = torch.arange(count)
            if self.config.batch_size:
                at = torch.randint(len(episodes) * length, (count,), generator=turn.generator)
            episode, time = at // length, at % length
            later = (time + self._steps(count, turn)).clamp(max=length)
            fields = {"x": episodes[episode, time], "next": episodes[episode, later]}
            yield Batch(fields, at.to(episodes.device))

    def _steps(self, count: int, turn: Turn) -> Tensor | int:
        if self.config.discount == 0:
            return 1
        uniform = 1 - torch.rand(count, generator=turn.generator, dtype=torch.float64)  # above 0
        return 1 + (uniform.log() / math.log(self.config.discount)).long()

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:  # noqa: ARG002
        """Return the objective of one batch. Its penalty is on the client's own second moment plus the correction."""
        assert isinstance(model, Drawing)
        weights = prefix_weights(self.config.dim, self.config.coefficients).to(self.task.device)
        phi = model(batch.x)
        attractive = (weights.diagonal() * (phi - model(batch.fields["next"])).square()).sum(1).mean()
        sampled = self.config.batch_size > 0
        loss: Tensor = attractive + self.config.beta * penalty(phi, weights, model.correction, without_diagonal=sampled)
        return loss

    def fit(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        assert isinstance(model, Drawing)
        buffer = self.record(data.train, state)
        with torch.no_grad():
            own = second_moment(model(buffer[:, :-1].flatten()))
            if self.config.exchange != "weights":
                # The mean is that of the round before. A client that sat it out has no part in it, and what it sent
                # earlier was at other weights.
                part = state[SENT] if state.get(SENT_IN) == turn.round - 1 else own
                model.correction.copy_(model.moment - part)
            model.moment.copy_(own)
        state[SENT], state[SENT_IN] = own, turn.round
        optimizer = self.optimizer(model, turn)
        if OPTIMIZER in state:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state[OPTIMIZER]})
        total = 0.0
        for batch in self.batches(Split.whole(x=buffer).to(buffer.device), turn):
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss(model, batch, turn)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(loss.detach())
        state[OPTIMIZER] = optimizer.state_dict()["state"]
        steps = len(buffer) * (buffer.shape[1] - 1)
        return {"loss": total / self.config.local_steps, "num-examples": steps}

    def record(self, recordings: Split, state: State) -> Tensor:
        """Play the next episodes of a client into its buffer, the oldest of which make room; return the buffer."""
        start = state.get(RECORDED, 0)
        new = recordings.fields["x"][recordings.rows[start : start + self.config.collect]]
        kept = torch.cat([state[BUFFER], new]) if BUFFER in state else new
        state[BUFFER], state[RECORDED] = kept[-self.config.capacity :], start + len(new)
        buffer: Tensor = state[BUFFER]
        return buffer

    # -- use ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split, turn: Turn, batch_size: int = 256) -> Metrics:  # noqa: ARG002
        """Return ``similarity``, ``similarity-rest``, ``subspace``, and ``loss``: the objective on the split's steps.

        The cloud has no weights to judge where they stay on the clients; it returns ``moment-error`` alone there, the
        distance of the second moment from the identity.
        """
        assert isinstance(model, Drawing)
        weights = prefix_weights(self.config.dim, self.config.coefficients)
        if self.config.exchange == "moments" and turn.client < 0:
            return {"moment-error": float((model.moment.cpu() - torch.eye(self.config.dim)).norm())}
        phi = model(torch.arange(len(model.positions), device=self.task.device)).cpu()
        cosines, missed = compared(phi.double(), self.task.facts["steps"])
        episodes = split.fields["x"][split.rows].cpu()
        here, there = phi[episodes[:, :-1].flatten()], phi[episodes[:, 1:].flatten()]
        loss = (weights.diagonal() * (here - there).square()).sum(1).mean()
        loss += self.config.beta * penalty(here, weights, torch.zeros_like(weights), without_diagonal=False)
        rest = cosines[1:] if len(cosines) > 1 else cosines
        return {
            "similarity": float(cosines.mean()),
            "similarity-rest": float(rest.mean()),
            "subspace": missed,
            "loss": float(loss),
        }


def prefix_weights(dim: int, coefficients: str) -> Tensor:
    """Return how many prefixes hold coordinates i and j together, ``(d, d)``; on the diagonal the coefficients c.

    A sum over prefixes k of a sum over i, j <= k is the sum over i, j with these weights. Equal coefficients have one
    prefix, the whole.
    """
    if coefficients == "equal":
        return torch.ones(dim, dim)
    place = torch.arange(dim)
    return (dim - torch.maximum(place[:, None], place)).float()


def second_moment(phi: Tensor) -> Tensor:
    """Return the mean of phi phi^T over ``(n, d)``."""
    return phi.T @ phi / len(phi)


def penalty(phi: Tensor, weights: Tensor, correction: Tensor, *, without_diagonal: bool) -> Tensor:
    """Return the weighted sum of (E[phi phi^T] + correction - I)^2 over states ``(n, d)``.

    Args:
        phi: all states there are, or a sample of them.
        weights: ``(d, d)``.
        correction: ``(d, d)``, a constant; what other clients' states add to the mean.
        without_diagonal: estimate the square of E[phi phi^T] by pairs of different members of a sample, which has no
            bias. Off, it is the square of the members' mean.
    """
    n, moment, target = len(phi), second_moment(phi), torch.eye(len(weights), device=phi.device) - correction
    squares = moment.square()
    if without_diagonal:
        squares = (n * squares - second_moment(phi.square())) / (n - 1)
    return (weights * (squares - 2 * target * moment + target.square())).sum()


def compared(phi: Tensor, steps: NDArray[np.int64]) -> tuple[Tensor, float]:
    """Compare coordinates with the eigenvectors of the graph of the given steps.

    Args:
        phi: coordinates of all states, ``(states, d)``, float64.
        steps: how often each state led to each, ``(states, states)``.

    Returns:
        |cosine| of every coordinate with its eigenvector, ``(d,)``, and the share of the eigenvectors' space that the
        coordinates do not span. Both under the inner product that weighs states by how often steps start there.
    """
    vectors = eigenvectors(steps)[1][:, : phi.shape[1]]
    root = torch.from_numpy(steps.sum(1) / steps.sum()).sqrt()
    drawn, true = root[:, None] * phi, root[:, None] * vectors
    cosines = (nn.functional.normalize(drawn, dim=0) * true).sum(0).abs()
    basis = torch.linalg.svd(drawn, full_matrices=False)[0]
    return cosines, float(1 - (basis.T @ true).square().sum() / phi.shape[1])


def eigenvectors(steps: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``(states,)``, rising, and eigenvectors ``(states, states)`` of the graph of steps.

    v and lambda with E[(v(s) - v(s'))^2] = 2 lambda E[v(s)^2]; E[v_i(s) v_j(s)] is 1 if i = j, else 0.
    """
    counts = torch.from_numpy(np.asarray(steps)).double()
    rate = counts / counts.sum()
    laplacian = torch.diag(rate.sum(0) + rate.sum(1)) / 2 - (rate + rate.T) / 2
    root = rate.sum(1).sqrt()
    values, vectors = torch.linalg.eigh(laplacian / root / root[:, None])
    return values, vectors / root[:, None]
