"""L2-GCN: a graph network trained layer by layer, each on features aggregated once; a controller says for how long."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.data.base import Batch, ClientData, Split
from trellis.registry import register
from trellis_clients.trainer import Metrics, State, Trainer, TrainerConfig, Turn
from trellis_clients.trainers.graphs import _pieces
from trellis_clients.trainers.graphs._controller import WIDTH, Controller, Memory, took

WHOLE = [0, 1, 2, 5, 6]
"""Entries of the schedule that count something; the others are losses."""
FEATURES, STAGE = "features", "stage"
"""Keys of a client's state: its nodes' aggregated features of a layer, ``(n, D)``, and which layer."""

Count = Annotated[int, Field(ge=1)]


class LayeredGcn(nn.Module):
    """The layers, the classifier on top of whichever is the last, and how far training has come.

    Attributes:
        weights: ``(D, hidden)`` of each layer.
        classifier: ``(hidden, classes)``, carried from layer to layer.
        schedule: layer in training (their number once all are done), epochs spent on it and on all, loss in the very
            first epoch and in the last, decisions made, the last action. Numbers that all clients compute alike.
        memory: hidden and cell state of the controller, ``(2, 8)``.
        baseline: mean cost of the controller's trials, and the stop threshold that they left behind.
    """

    schedule: Tensor
    memory: Tensor
    baseline: Tensor

    controller: Controller | None

    def __init__(self, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.init.xavier_uniform_(torch.empty(a, b)) for a, b in pairwise(widths))
        self.classifier = nn.Parameter(nn.init.xavier_uniform_(torch.empty(widths[-1], classes)))
        self.controller = None
        self.register_buffer("schedule", torch.zeros(7))
        self.register_buffer("memory", torch.zeros(2, WIDTH))
        self.register_buffer("baseline", torch.tensor([0.3, 0.5]))

    @property
    def stage(self) -> int:
        return round(float(self.schedule[0]))

    def layer(self, h: Tensor, number: int) -> Tensor:
        """Return a layer's output of features that are aggregated already."""
        return F.relu(h @ self.weights[number])

    def forward(self, h: Tensor, number: int) -> Tensor:
        """Return logits of a layer's aggregated features."""
        logits: Tensor = self.layer(h, number) @ self.classifier
        return logits


@register(
    "trainers",
    "l2-gcn",
    summary="graph convolutions trained layer by layer, with a learned stop; one aggregation a layer",
    paper="arXiv 2003.13606",
    takes=("graph",),
    sends="weights",
    payload="weights, the schedule, a learned controller",
    strategies=("fedavg", "fedprox", "partial"),
)
class L2Gcn(Trainer):
    """You et al., "L2-GCN: Layer-Wise and Learned Efficient Training of Graph Convolutional Networks", CVPR 2020.

    L-GCN: for layer l = 1..L aggregate once, H = A X^{l-1} with A = D^-1 (A + I) + I as the authors have
    it in code; train ReLU(H W_l) C on mini-batches of rows by cross-entropy with Adam; freeze W_l; X^l = ReLU(H W_l).
    No gradient passes through A. C is carried on from layer to layer, the authors' variant for citation graphs, and
    there are no biases. ``scheme: end-to-end`` is the baseline: the whole network on the whole subgraph in every step.

    L2-GCN: ``controller: learned`` lets an LSTM stop each layer. In the first ``search_rounds`` clients
    train it by REINFORCE on sampled subgraphs of their own: actions are drawn, a trial costs its last loss plus
    ``time_ratio`` times its epochs, and the weights are averaged like any others. Afterwards it decides: a layer stops
    where the stop probability reaches the mean one of the last search trials, within ``min_epochs`` and ``max_epochs``.
    A decision follows ``local_epochs`` epochs of the layer, so each is trained; the controller sees how far the loss
    has come since the first layer began.

    In a federation a round is ``local_epochs`` epochs of one layer, the same for all, as features computed with a
    client's own W would not fit the averaged one. How far training has come is part of the model (``schedule``): every
    client works out the next step from the same averaged numbers, the loss of all among them, and comes to the same;
    hence strategies that do more than average are refused.
    X^l is private: made anew from the averaged W when a layer begins, kept in the client's state, never sent. Edges
    between clients are lost. Under ``controller: fixed`` finished layers are ``frozen``, so that the strategy
    ``partial`` sends them once. When all layers are done clients send back what they got (set
    ``screening.allow_unchanged``). A client evaluates on its whole subgraph, the cloud on the held-out nodes' own.

    What differs from the released code: one Adam a turn, of the layer in training alone (its one Adam moves finished
    layers on), and of the controller likewise; all trials draw their actions (its warm-up's predefined patterns keep
    the drawn actions' gradients); the first decision follows ``local_epochs`` epochs (one there); the advantage is
    taken over the mean cost of the trials before (with the trial itself there); the network's loss is the mean over an
    epoch and over clients, and so is what it is compared with, the first epoch's (a last mini-batch's there; in a
    trial, both have the loss before the first step); the action fed back is the one taken (the one drawn there, outside
    the warm-up). C carried on is its variant for citation graphs, Xavier's initialisation its variant for PPI.

    Of metrics, ``products`` counts a client's sparse products in the turn (forward; end-to-end training has as many
    again, less one, going back), ``epochs`` the network's epochs so far, and ``trial-epochs``, under a learned
    controller, those of the turn's trials, which train networks of their own.
    """

    class Config(TrainerConfig):
        lr: Annotated[float, Field(gt=0)] = 0.01
        batch_size: Count = 64
        local_epochs: Count = Field(5, description="epochs a round; a decision of the controller lies before each")
        layers: Annotated[int, Field(ge=1, le=6)] = 2
        hidden: Count = 16
        scheme: Literal["layer-wise", "end-to-end"] = "layer-wise"
        neighbours: bool = Field(True, description="False leaves edges out: a plain network of the same size")
        controller: Literal["fixed", "learned"] = "learned"
        layer_epochs: Count = Field(80, description="epochs of each layer under a fixed controller")
        min_epochs: Annotated[int, Field(ge=0)] = Field(35, description="of each layer under a learned one")
        max_epochs: Count = 95
        search_rounds: Annotated[int, Field(ge=0)] = 12
        search_trials: Count = Field(5, description="trials a turn")
        search_nodes: Count = Field(128, description="nodes of a trial")
        search_lr: Annotated[float, Field(gt=0)] = 0.05
        decisions: Count = Field(
            20, description="most decisions over all layers in a trial; then a layer stops after local_epochs"
        )
        time_ratio: Annotated[float, Field(ge=0)] = Field(1e-4, description="what an epoch costs")
        baseline_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9

        def model_post_init(self, _: object) -> None:
            if self.momentum:
                raise ValueError("l2-gcn trains with Adam, which takes no momentum: momentum must be 0")
            if self.controller == "learned" and self.scheme == "end-to-end":
                raise ValueError("scheme end-to-end has no layers to stop: set trainer.controller to fixed")
            if self.min_epochs > self.max_epochs:
                raise ValueError(f"min_epochs is {self.min_epochs}, more than max_epochs, {self.max_epochs}")

    config: Config

    # -- phases ---------------------------------------------------------------------------------------

    @property
    def learned(self) -> bool:
        return self.config.controller == "learned"

    def frozen(self, number: int) -> tuple[str, ...]:
        c = self.config
        if self.learned or c.scheme == "end-to-end":
            return ()
        done = (number - 1) // -(-c.layer_epochs // c.local_epochs)
        return tuple(f"weights.{layer}" for layer in range(min(done, c.layers)))

    @torch.no_grad()
    def advance(self, model: LayeredGcn) -> None:
        """Decide whether the layer in training is done, from what all clients know."""
        model.schedule[WHOLE] = model.schedule[WHOLE].round()  # their average may miss them by a last bit
        stage, epochs = model.stage, int(model.schedule[1])
        if stage == self.config.layers or not epochs or self.config.scheme == "end-to-end":
            return
        stop = self._decides(model, stage, epochs) if self.learned else epochs >= self.config.layer_epochs
        if stop:
            model.schedule[0] += 1
            model.schedule[1] = 0.0

    def _decides(self, model: LayeredGcn, stage: int, epochs: int) -> bool:
        assert model.controller is not None
        c, (start, last, decisions, action) = self.config, model.schedule[3:].tolist()
        if decisions >= c.decisions:  # the controller knows no more; the last word is max_epochs
            return epochs >= c.max_epochs
        memory = Memory(model.memory[0], model.memory[1], int(decisions), int(action))
        log_probabilities, memory = model.controller(last - start, stage, memory)
        wants = float(log_probabilities[1].exp()) >= float(model.baseline[1])
        stop = epochs >= c.max_epochs or (epochs >= c.min_epochs and wants)
        memory = took(memory, int(stop))
        model.memory.copy_(torch.stack([memory.hidden, memory.cell]))
        model.schedule[5], model.schedule[6] = memory.decisions, memory.action
        return stop

    # -- the graph ------------------------------------------------------------------------------------

    def matrix(self, rows: Tensor) -> Tensor | None:
        """Return the adjacency of the subgraph of some nodes; None where neighbours do not count."""
        if not self.config.neighbours:
            return None
        edges = self.task.facts["edges"].to(rows.device)
        return _pieces.adjacency(_pieces.subgraph(edges, rows), len(rows))

    def features(self, model: LayeredGcn, train: Split, state: State) -> tuple[Tensor, int]:
        """Return aggregated features of the layer in training, and how many products that took.

        They are made anew only where a layer begins: from those of the layer before, by the weights it ended with.
        """
        stage, products = min(model.stage, self.config.layers - 1), 0
        if state.get(STAGE) == stage:
            return state[FEATURES], 0
        matrix = self.matrix(train.rows)
        with torch.no_grad():
            while state.get(STAGE, -1) < stage:
                below = state.get(STAGE, -1)
                x = train.fields["x"][train.rows] if below < 0 else model.layer(state[FEATURES], below)
                state[FEATURES], state[STAGE] = x if matrix is None else _pieces.aggregate(matrix, x), below + 1
                products += matrix is not None
        return state[FEATURES], products

    # -- the hooks ------------------------------------------------------------------------------------

    def build(self) -> LayeredGcn:
        c = self.config
        model = LayeredGcn((*self.task.shape, *[c.hidden] * c.layers), self.task.num_classes)
        if self.learned:
            model.controller = Controller(c.layers, c.decisions)
        return model

    def optimizer(self, model: nn.Module, turn: Turn) -> torch.optim.Optimizer:  # noqa: ARG002
        assert isinstance(model, LayeredGcn)
        every = self.config.scheme == "end-to-end"
        trained = list(model.weights) if every else [model.weights[min(model.stage, self.config.layers - 1)]]
        return torch.optim.Adam([*trained, model.classifier], lr=self.config.lr, weight_decay=self.config.weight_decay)

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:  # noqa: ARG002
        """Return the cross-entropy of the layer in training on rows of aggregated features, field ``h``."""
        assert isinstance(model, LayeredGcn)
        return F.cross_entropy(model(batch.fields["h"], min(model.stage, self.config.layers - 1)), batch.y)

    def fit(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        assert isinstance(model, LayeredGcn)
        if self.learned and turn.round <= self.config.search_rounds:
            return self.search(model, data.train, turn)
        self.advance(model)
        y = data.train.fields["y"][data.train.rows]
        if self.config.scheme == "end-to-end":
            losses, products = self._end_to_end(model, data.train, y, turn)
        else:
            h, products = self.features(model, data.train, state)
            losses = self._layer(model, Split.whole(h=h, y=y).to(y.device), turn)
        if model.stage < self.config.layers:
            with torch.no_grad():
                if not model.schedule[2]:
                    model.schedule[3] = losses[0]
                model.schedule[4] = losses[-1]
                model.schedule[1:3] += self.config.local_epochs
        metrics = {"loss": losses[-1], "products": products, "stage": model.stage, "epochs": float(model.schedule[2])}
        return {**metrics, "trial-epochs": 0} if self.learned else metrics

    def _layer(self, model: LayeredGcn, rows: Split, turn: Turn) -> list[float]:
        """Train the layer on a client's rows; return the mean loss of each epoch. A finished network stays as it is."""
        if model.stage == self.config.layers:
            with torch.no_grad():
                whole = Batch(rows.fields, torch.empty(0))
                return [float(self.loss(model, whole, turn))]
        optimizer, total, seen = self.optimizer(model, turn), 0.0, 0
        losses: list[float] = []
        size = self.config.batch_size
        epoch = len(rows) // size * size if self.config.drop_last and len(rows) > size else len(rows)
        for batch in self.batches(rows, turn):
            optimizer.zero_grad(set_to_none=True)
            total += float(self.backward(model, batch, turn)) * len(batch)
            self.adjust_gradients(model, {}, turn)
            optimizer.step()
            seen += len(batch)
            if seen >= epoch * (len(losses) + 1):
                losses.append(total / epoch)
                total = 0.0
        return losses

    def _end_to_end(self, model: LayeredGcn, train: Split, y: Tensor, turn: Turn) -> tuple[list[float], int]:
        """Train all layers, one step on the whole subgraph an epoch; return each step's loss, and the products."""
        optimizer, matrix = self.optimizer(model, turn), self.matrix(train.rows)
        losses: list[float] = []
        for _ in range(self.config.local_epochs):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(self.network(model, train.fields["x"][train.rows], matrix), y)
            loss.backward()  # type: ignore[no-untyped-call]
            self.adjust_gradients(model, {}, turn)
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses, self.config.layers * self.config.local_epochs * (matrix is not None)

    def network(self, model: LayeredGcn, x: Tensor, matrix: Tensor | None) -> Tensor:
        """Return logits of all nodes of a graph, by the layers there are so far."""
        c = self.config
        last = c.layers - 1 if c.scheme == "end-to-end" else min(model.stage, c.layers - 1)
        for number in range(last + 1):
            x = model.layer(x if matrix is None else _pieces.aggregate(matrix, x), number)
        logits: Tensor = x @ model.classifier
        return logits

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split, turn: Turn, batch_size: int = 256) -> Metrics:  # noqa: ARG002
        """Return loss and accuracy on a split's nodes, among all nodes of the client or, in the cloud, of the split."""
        assert isinstance(model, LayeredGcn)
        others = turn.data.train.rows if turn.data is not None else split.rows[:0]
        rows = torch.cat([split.rows, others])
        logits = self.network(model, split.fields["x"][rows], self.matrix(rows))[: len(split)]
        y = split.fields["y"][split.rows]
        accuracy = float((logits.argmax(1) == y).float().mean())
        return {"accuracy": accuracy, "loss": float(F.cross_entropy(logits, y)), "epochs": float(model.schedule[2])}

    # -- the controller -------------------------------------------------------------------------------

    def search(self, model: LayeredGcn, train: Split, turn: Turn) -> Metrics:
        """Improve the controller by trials on subgraphs of the client's nodes; return their mean cost as ``loss``."""
        assert model.controller is not None
        c, optimizer = self.config, torch.optim.Adam(model.controller.parameters(), lr=self.config.search_lr)
        costs, spent = [], []
        for _ in range(c.search_trials):
            some = torch.randperm(len(train), generator=turn.generator)[: c.search_nodes].to(train.rows.device)
            log_probability, stops, loss, epochs = self.trial(model.controller, train.subset(some), turn)
            cost = loss + c.time_ratio * epochs
            optimizer.zero_grad(set_to_none=True)
            ((cost - float(model.baseline[0])) * log_probability).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                model.baseline[0] += (1 - c.baseline_decay) * (cost - model.baseline[0])
                model.baseline[1] = sum(stops) / len(stops)
            costs.append(cost)
            spent.append(epochs)
        return {
            "loss": sum(costs) / len(costs),
            "products": float(c.layers * c.search_trials * c.neighbours),
            "stage": 0,
            "epochs": 0,
            "trial-epochs": sum(spent),
        }

    def trial(self, controller: Controller, nodes: Split, turn: Turn) -> tuple[Tensor, list[float], float, int]:
        """Train a fresh network layer by layer on the subgraph of some nodes, stopping as the controller draws.

        The controller is asked after every ``local_epochs`` steps of a layer, so that each is trained. It is told how
        far the loss has come from what it was before the first step of all.

        Returns:
            The log-probability of the actions that were drawn, the stop probability at each decision, the last loss,
            and the epochs of all layers.
        """
        c, matrix = self.config, self.matrix(nodes.rows)
        net = LayeredGcn((*self.task.shape, *[c.hidden] * c.layers), self.task.num_classes).to(self.task.device)
        x, y = nodes.fields["x"][nodes.rows], nodes.fields["y"][nodes.rows]
        total, stops, memory = torch.zeros((), device=y.device), [], controller.fresh()
        spent, start, value = 0, 0.0, 0.0
        for number in range(c.layers):
            h = x if matrix is None else _pieces.aggregate(matrix, x)
            optimizer = torch.optim.Adam([net.weights[number], net.classifier], lr=c.lr)
            action = 0
            while not action:
                for _ in range(c.local_epochs):
                    optimizer.zero_grad(set_to_none=True)
                    loss = F.cross_entropy(net(h, number), y)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    value, spent = float(loss.detach()), spent + 1
                    start = value if spent == 1 else start
                if memory.decisions == c.decisions:
                    break
                log_probabilities, memory = controller(value - start, number, memory)
                stop = float(log_probabilities[1].exp().detach())
                action = int(float(torch.rand((), generator=turn.generator)) < stop)
                total, memory = total + log_probabilities[action], took(memory, action)
                stops.append(stop)
            x = net.layer(h, number).detach()
        return total, stops, value, spent
