"""NC-FSCIL: few-shot classes are learnt one session after another under a classifier that was fixed beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trellis import seeding
from trellis.data.base import Batch, ClientData, Split
from trellis.errors import DataError, PluginError, ScenarioError
from trellis.models._base import image_shape
from trellis.registry import register
from trellis_clients.trainer import Metrics, NonNegative, State, Task, Trainer, TrainerConfig, Turn, in_order
from trellis_clients.trainers.class_incremental._pieces import Neck, ResNet12, simplex_etf

MEMORY = "memory"
"""Key of a client's state: the maps it keeps of its own images, by class, ``(rows, C, h, w)``."""

Count = Annotated[int, Field(ge=1)]


class NcFscilModel(nn.Module):
    """Backbone, neck and classifier.

    Attributes:
        etf: ``(D, K)``, column c is the place of class c. A buffer: drawn from the seed, never trained, never sent.
        head: the learnable classifier of the baseline, or None.
    """

    etf: Tensor

    def __init__(self, backbone: nn.Module, neck: nn.Module, etf: Tensor, head: nn.Linear | None) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head
        self.register_buffer("etf", etf)

    def scores(self, maps: Tensor, classes: int) -> Tensor:
        """Return one score for each of the first ``classes`` classes: cosines with their places, or logits."""
        features = self.neck(maps)
        if self.head is not None:
            logits: Tensor = self.head(features)
            return logits[:, :classes]
        return F.normalize(features) @ self.etf[:, :classes]


@register(
    "trainers",
    "nc-fscil",
    summary="few-shot class-incremental learning under a fixed simplex classifier",
    paper="Yang et al., Neural Collapse Inspired Feature-Classifier Alignment for Few-Shot Class Incremental Learning,"
    " ICLR 2023",
    takes=("image",),
    sends="weights",
)
class NcFscil(Trainer):
    """NC-FSCIL: features are pulled to the vertices of a simplex that has a place for every class there will ever be.

    The classifier (section 4.1, equation 1) is an equiangular tight frame over all K classes, fixed from the start.
    The loss (section 4.2) is the dot regression w/2 (m_y . mu - 1)^2 of the normalised feature mu, a pull and nothing
    else, so a new class does not push old ones. Phases follow the rounds:

    - ``base_rounds`` of the base session: backbone and neck learn the first ``base_classes`` classes;
    - then sessions of ``session_rounds`` each bring ``ways`` more classes, in the order of the labels, with ``shots``
      images a client. The backbone is frozen; a client keeps the mean backbone map of each class it held before, and
      only the neck trains: on the maps of the current shots, ``copies`` of each earlier novel class's mean, and one
      mean of each base class. Mean maps are taken before pooling, which is not the mean of neck outputs.

    Predictions are over the classes seen so far. Test examples of later classes do not count yet.

    In a federation the frame is drawn from the seed on every side alike. Mean maps are private: they live in the
    client's state. Training images of base classes are read in the base session, and once more in a client's first
    turn of a session, for their mean maps; after that turn none is. In sessions the backbone does not change
    (``frozen``), so the strategy ``partial`` sends it once and the neck alone from then on; ``fedavg`` gives the same
    bits with more traffic. A client with no image of the classes so far trains nothing and sends back what it got: set
    ``screening.allow_unchanged`` where labels are that skewed.

    What differs: blocks of the backbone are as many and as wide as small images allow (``widths``; the paper's are 64,
    160, 320, 640, with features of 512 and a rate of 0.25); no mixing of images; the rate is constant within a
    session, as a turn is too short for warm-up and cosine; each client has its own ``shots``. ``classifier:
    learnable`` is the baseline: cross-entropy with a linear layer over the classes so far, all else alike. What the
    one gains over the other on digits is among the claims of docs/papers.md.
    """

    class Config(TrainerConfig):
        lr: Annotated[float, Field(gt=0)] = 0.05
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
        weight_decay: NonNegative = 5e-4
        batch_size: Count = 64
        drop_last: bool = True
        batch_norm: Literal["average", "local"] = Field(
            "average", description="statistics are frozen with the backbone, so they cannot be computed anew"
        )
        classifier: Literal["etf", "learnable"] = "etf"
        widths: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
            (16, 32), description="channels of the backbone's blocks, each of which halves the image"
        )
        dim: Count = Field(32, description="features D; at least as many as there are classes")
        weight: Annotated[float, Field(gt=0)] = Field(10.0, description="w of the dot regression loss")
        base_classes: Count = 6
        base_rounds: Count = 6
        ways: Count = Field(2, description="new classes a session")
        shots: Count = Field(5, description="images a client is shown of each new class")
        session_rounds: Count = 2
        session_lr: Annotated[float, Field(gt=0)] = 0.01
        session_steps: Count = Field(100, description="steps a turn in sessions; the paper takes 50 to 200 a session")
        session_batch: Annotated[int, Field(ge=2)] = 8
        copies: Count = Field(1, description="times that the mean of an earlier novel class stands in a session's data")
        mix: Annotated[float, Field(ge=0, le=1)] = Field(
            0.75, description="share of session steps that mix features half and half; 0 in the paper but for CIFAR-100"
        )
        lengths: bool = Field(True, description="scale places by class counts in sessions; the paper's for CIFAR-100")

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task)
        classes = task.num_classes
        if not config.base_classes < classes:
            raise ScenarioError(
                "fscil-classes",
                f"trainer.base_classes is {config.base_classes}; of the data's {classes} classes some must come later,"
                f" so it must be at most {classes - 1}",
            )
        if config.dim < classes:
            raise ScenarioError(
                "fscil-dimension",
                f"trainer.dim is {config.dim}; a simplex of the data's {classes} classes needs at least {classes}",
            )

    # -- phases ---------------------------------------------------------------------------------------

    def session(self, number: int) -> int:
        """Return the session of a round: 0 is the base session; after the last new classes it stays the last."""
        c = self.config
        last = math.ceil((self.task.num_classes - c.base_classes) / c.ways)
        session: int = min(max(0, math.ceil((number - c.base_rounds) / c.session_rounds)), last)
        return session

    def seen(self, session: int) -> int:
        """Return how many classes there are up to a session."""
        classes: int = self.config.base_classes + session * self.config.ways
        return min(classes, self.task.num_classes)

    def frozen(self, number: int) -> tuple[str, ...]:
        return ("backbone.",) if self.session(number) else ()

    # -- the model ------------------------------------------------------------------------------------

    def build(self) -> NcFscilModel:
        c = self.config
        channels, height, width = image_shape(self.task.shape, "nc-fscil", 2)
        if (most := int(math.log2(min(height, width)))) < len(c.widths):
            raise ScenarioError(
                "fscil-widths",
                f"trainer.widths has {len(c.widths)} blocks, each of which halves the image; images of {height}x{width}"
                f" pixels allow at most {most}",
            )
        etf = simplex_etf(c.dim, self.task.num_classes, seeding.torch_generator(self.task.seed, "simplex"))
        head = nn.Linear(c.dim, self.task.num_classes) if c.classifier == "learnable" else None
        return NcFscilModel(ResNet12(channels, c.widths), Neck(c.widths[-1], c.dim), etf, head)

    def shared(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: values for name, values in super().shared(model).items() if name != "etf"}

    # -- training -------------------------------------------------------------------------------------

    def fit(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        session = self.session(turn.round)
        train = self.memory(model, data.train, state, session) if session else self.upto(data.train, session)
        counted = max(len(train), 1)
        return {**super().fit(model, replace(data, train=train), state, turn), "num-examples": counted}

    def optimizer(self, model: nn.Module, turn: Turn) -> torch.optim.Optimizer:
        c, session = self.config, self.session(turn.round)
        trained = [p for name, p in model.named_parameters() if not name.startswith(self.frozen(turn.round))]
        lr = c.session_lr if session else c.lr
        return torch.optim.SGD(trained, lr=lr, momentum=c.momentum, weight_decay=c.weight_decay)

    def batches(self, split: Split, turn: Turn) -> Iterator[Batch]:
        session = self.session(turn.round)
        if not session:
            shown = self.upto(split, session)
            yield from (batch for batch in super().batches(shown, turn) if len(batch) > 1)  # batch norm needs two
            return
        if "maps" not in split.fields:  # raw examples, from a replay of the turn that knows nothing of `fit`
            raise PluginError(
                "fscil-maps",
                f"session {session} of trainer 'nc-fscil' trains on maps that a client keeps; these examples have only"
                f" {' and '.join(split.fields)}: rounds of sessions cannot be replayed",
            )
        size = min(self.config.session_batch, len(split))
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(self.config.session_steps if size else 0):
            if len(order) < size:
                order = torch.cat([order, torch.randperm(len(split), generator=turn.generator)])
            yield split.batch(order[:size].to(split.rows.device))
            order = order[size:]

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:
        assert isinstance(model, NcFscilModel)
        c, session = self.config, self.session(turn.round)
        maps = batch.fields["maps"] if "maps" in batch.fields else model.backbone(batch.x)
        features = model.neck(maps)
        if not session or float(torch.rand((), generator=turn.generator)) >= c.mix:
            return self.objective(model, features, batch.y, session)
        other = torch.randperm(len(batch), generator=turn.generator).to(features.device)
        mixed = (features + features[other]) / 2
        first, second = (self.objective(model, mixed, y, session) for y in (batch.y, batch.y[other]))
        return (first + second) / 2

    def objective(self, model: NcFscilModel, features: Tensor, y: Tensor, session: int) -> Tensor:
        """Return the loss of features ``(n, D)`` under the labels they stand for."""
        if model.head is not None:
            return F.cross_entropy(model.head(features)[:, : self.seen(session)], y)
        lengths = length_factors(y) if session and self.config.lengths else None
        loss: Tensor = self.config.weight * dot_regression(features, model.etf.T[y], lengths)
        return loss

    # -- what a client keeps --------------------------------------------------------------------------

    def upto(self, split: Split, session: int) -> Split:
        """Return the examples of the classes up to a session."""
        return split.subset((split.fields["y"][split.rows] < self.seen(session)).nonzero()[:, 0])

    @torch.no_grad()
    def memory(self, model: nn.Module, split: Split, state: State, session: int) -> Split:
        """Return a session's training data, fields ``maps`` and ``y``, and keep in ``state`` what later ones need.

        Only images of classes that are not kept yet are looked at: all of a base class, ``shots`` of a new one. The
        shots of a session are kept as they are while it lasts, and as their mean afterwards.
        """
        assert isinstance(model, NcFscilModel)
        model.eval()
        kept: dict[int, Tensor] = state.setdefault(MEMORY, {})
        labels = split.fields["y"][split.rows]
        maps, y = [], []
        for label in range(self.seen(session)):
            base = label < self.config.base_classes
            if label not in kept:
                rows = (labels == label).nonzero()[:, 0]
                if not len(rows):
                    continue
                chosen = split.subset(rows if base else rows[: self.config.shots])
                kept[label] = torch.cat([model.backbone(batch.x) for batch in in_order(chosen, 256)])
            if label < self.seen(session - 1):
                kept[label] = kept[label].mean(0, keepdim=True)
            earlier = self.config.base_classes <= label < self.seen(session - 1)
            copies = self.config.copies if earlier else 1
            maps += [kept[label]] * copies
            y += [torch.full((len(kept[label]) * copies,), label, device=labels.device)]
        if not maps:
            return Split.whole(maps=torch.empty(0), y=labels[:0])
        whole = Split.whole(maps=torch.cat(maps), y=torch.cat(y))
        return whole.to(labels.device)

    # -- use ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split, turn: Turn, batch_size: int = 256) -> Metrics:
        """Return loss and accuracy over the classes seen so far.

        In the cloud also ``accuracy-base`` and ``accuracy-novel``, each over its own examples, and ``alignment``: the
        mean cosine of a feature with its class's place (of the simplex classifier only).
        """
        assert isinstance(model, NcFscilModel)
        model.eval()
        session = self.session(turn.round)
        judged, classes = self.upto(split, session), self.seen(session)
        if not len(judged):
            raise DataError(
                "client-no-test", f"client {turn.client} holds no test examples of the first {classes} classes"
            )
        parts = [(model.scores(model.backbone(batch.x), classes), batch.y) for batch in in_order(judged, batch_size)]
        scores, y = (torch.cat(column) for column in zip(*parts, strict=True))
        right, own = (scores.argmax(1) == y).float(), scores.gather(1, y[:, None])[:, 0]
        simplex = self.config.classifier == "etf"
        loss = self.config.weight / 2 * (own - 1).square().mean() if simplex else F.cross_entropy(scores, y)
        metrics: dict[str, Any] = {"loss": float(loss), "accuracy": float(right.mean())}
        if turn.client >= 0:
            return {**metrics, "num-examples": len(judged)}
        metrics["classes"] = classes
        if simplex:
            metrics["alignment"] = float(own.mean())
        for name, members in (("base", y < self.config.base_classes), ("novel", y >= self.config.base_classes)):
            if bool(members.any()):
                metrics[f"accuracy-{name}"] = float(right[members].mean())
        return metrics


def dot_regression(features: Tensor, places: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return the mean of 1/2 (l m . mu - l)^2 over a batch.

    Args:
        features: ``(n, D)``, of any norm; mu is their direction.
        places: ``(n, D)``, the unit vectors m of their classes.
        lengths: ``(n,)``, the lengths l; 1 if not given.
    """
    cosines = (F.normalize(features) * places).sum(1)
    error = cosines - 1 if lengths is None else lengths * (cosines - 1)
    return error.square().mean() / 2


def length_factors(labels: Tensor) -> Tensor:
    """Return sqrt(g / n_c) for each label of a batch: n_c its count, g the mean count of the classes in the batch."""
    _, place, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    factors: Tensor = (counts.float().mean() / counts).sqrt()[place]
    return factors
