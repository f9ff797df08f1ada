"""RMT: a student on a stream, held by a mean teacher and by the source's prototypes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.data.base import Batch, ClientData, Split
from trellis.data.streams import Stream
from trellis.errors import PluginError
from trellis.registry import register
from trellis_clients import batchnorm
from trellis_clients.trainer import Metrics, State, Turn, in_order
from trellis_clients.trainers.adaptation._views import another_view
from trellis_clients.trainers.cloud_edge._edge import EdgeConfig, EdgeTrainer

RMT = "rmt"
"""Key of a client's state: student, teacher, projector, optimizer and prototypes."""


@register(
    "trainers",
    "rmt",
    summary="RMT: mean teacher with symmetric cross-entropy and contrast to source prototypes, on the device",
    paper="arXiv 2211.13081",
    takes=("image",),
    sends="uploads",
    payload="metrics alone",
    replies=("uploads",),
)
class Rmt(EdgeTrainer):
    """Doebler et al., "Robust Mean Teacher for Continual and Gradual Test-Time Adaptation", CVPR 2023.

    Objective, warm-up and defaults are those of the authors' code: ``classification/methods/rmt.py`` in
    github.com/mariodoebler/test-time-adaptation.

    Student and teacher start as the source model and normalise by each batch's own statistics; all of the student's
    parameters adapt, and nothing is ever reset. A batch is answered by the sum of both models' logits, then the student
    takes one step of Adam (`objective`): symmetric cross-entropy with the teacher on the images and on another view of
    them, contrast between an image, its view and its nearest source prototype, and, with ``source_weight``,
    cross-entropy on a batch of labelled source images. The teacher follows as a moving average of parameters.

    Before its first batch a client computes the class means of the source features, which stay as they are, and warms
    up on source images without their labels: symmetric cross-entropy with the teacher, whatever ``symmetric`` says, at
    a rate that rises from zero. Both need source data, which here are the client's own clean training examples; classes
    it has none of have no prototype. Models are in evaluation mode throughout (no dropout), as the authors' have been
    since March 2023; in their first release they were in training mode. What the views lack is said in `another_view`;
    they are mirrored only if ``flip`` says so: a digit's mirror image is none. The teacher's momentum, the projector
    and the warm-up are for short streams; the paper's are in the config.

    **Federated.** Everything that adapts stays on the device, across rounds and restarts; nothing is uploaded. Averages
    of teachers in different domains would mix their adaptations, and projectors are each client's own. The source
    model comes once (strategy ``cema``), and its batch-norm statistics stay in the state as they came.
    """

    class Config(EdgeConfig):
        lr: float = Field(1e-3, gt=0, description="of Adam")
        beta1: float = Field(0.9, ge=0, lt=1)
        source_weight: float = Field(0.0, ge=0, description="lambda_src; 1 in the paper; 0 is its source-free variant")
        target_weight: float = Field(1.0, ge=0, description="lambda_trg, of the symmetric cross-entropy")
        contrast_weight: float = Field(1.0, ge=0, description="lambda_cont")
        symmetric: bool = Field(True, description="False: cross-entropy to the teacher only, as a plain mean teacher")
        teacher_momentum: float = Field(0.99, ge=0, le=1, description="0.999 in the paper, for long streams")
        temperature: float = Field(0.1, gt=0)
        projector: int = Field(32, ge=1, description="width of the two projector layers; 128")
        warmup_images: int = Field(1000, ge=0, description="50000")
        flip: bool = Field(False, description="views may be mirror images")

        def model_post_init(self, _: object) -> None:
            if self.momentum:
                raise ValueError(f"momentum is {self.momentum}, but rmt steps by Adam: set beta1, and leave it at 0")
            if self.max_grad_norm is not None:
                raise ValueError(f"max_grad_norm is {self.max_grad_norm}, but rmt clips no gradients: leave it out")

    config: Config

    def build(self) -> nn.Module:
        """Return the scenario's model, all of which adapts.

        Raises:
            DataError: it has no normalisation layers.
            PluginError: it has no features and head.
        """
        model = super().build().requires_grad_(True)
        if not callable(getattr(model, "features", None)) or not isinstance(getattr(model, "head", None), nn.Linear):
            raise PluginError(
                "model-head", f"trainer 'rmt' compares features: {type(model).__name__} has no features(x) and head"
            )
        return model

    # -- what a client keeps --------------------------------------------------------------------------

    def prepare(self, model: nn.Module, data: ClientData, state: State, turn: Turn) -> None:
        """Compute prototypes and warm up, before the first batch."""
        turn.data = data  # for `adapt`, which replays source images and needs the stream's way to pixels
        if RMT not in state:
            own = Adapting(self.config, model, data.train, self.stream(data))
            own.prototypes = prototypes(model, data.train, self.task.num_classes, turn.generator)
            self._warm_up(own, turn)
            state[RMT] = own.state()

    def _warm_up(self, own: Adapting, turn: Turn) -> None:
        size = self.config.stream.batch_size
        steps = self.config.warmup_images // size if len(own.source) >= 2 else 0
        for step in range(steps):
            x = own.source.batch(_drawn(own.source, size, turn.generator)).x
            for group in own.optimizer.param_groups:
                group["lr"] = self.config.lr * ((step + 1) / steps)
            with batchnorm.batch_statistics(own.student), batchnorm.batch_statistics(own.teacher):
                with torch.no_grad():
                    target = own.teacher(x)
                out = own.student(x)
            own.step(0.5 * (surprise(out, target) + surprise(target, out)).mean())

    # -- a batch of the stream ------------------------------------------------------------------------

    def adapt(self, model: nn.Module, stream: Iterable[Batch], state: State, turn: Turn) -> Iterator[Tensor]:
        """Answer each batch by student and teacher, then take a step on it."""
        assert turn.data is not None, "prepare() comes before the stream"
        own = Adapting(self.config, model, turn.data.train, self.stream(turn.data), state[RMT])
        for batch in stream:
            with batchnorm.batch_statistics(own.student), batchnorm.batch_statistics(own.teacher):
                with torch.no_grad():
                    target = own.teacher(batch.x)
                features: Tensor = own.student.features(batch.x)  # type: ignore[operator]
                logits: Tensor = own.student.head(features)  # type: ignore[operator]
            yield logits.detach() + target
            with batchnorm.batch_statistics(own.student):
                loss = self.objective(own, batch.x, features, logits, target, turn)
            own.step(loss)
            self.work.forwards += 3 * len(batch)
            self.work.backwards += 2 * len(batch)
        state[RMT] = own.state()
        with torch.no_grad():
            live = model.state_dict()
            for name, values in own.student.state_dict().items():
                live[name].copy_(values)

    def objective(
        self, own: Adapting, x: Tensor, features: Tensor, logits: Tensor, target: Tensor, turn: Turn
    ) -> Tensor:
        """Return the loss of a batch ``x``, of which the student's features and logits and the teacher's logits are."""
        c = self.config
        view = own.lens.to_inputs(another_view(own.lens.to_pixels(x), turn.generator, c.flip))
        seen: Tensor = own.student.features(view)  # type: ignore[operator]
        other: Tensor = own.student.head(seen)  # type: ignore[operator]
        if c.symmetric:
            entropies = surprise(logits, target) + surprise(target, logits)
            entropies = (entropies + surprise(other, target) + surprise(target, other)) / 4
        else:
            entropies = (surprise(logits, target) + surprise(other, target)) / 2
        loss = c.target_weight * entropies.mean()
        if c.contrast_weight:
            anchors = nearest(features.detach(), own.prototypes)
            views = torch.stack([own.projector(each) for each in (anchors, features, seen)])
            loss = loss + c.contrast_weight * contrast(views, c.temperature)
        if c.source_weight:
            replayed = own.source.batch(_drawn(own.source, len(x), turn.generator))
            loss = loss + c.source_weight * F.cross_entropy(own.student(replayed.x), replayed.y)
            self.work.forwards += len(replayed)
            self.work.backwards += len(replayed)
        return loss

    def answer(self, action: str, model: nn.Module, data: ClientData, state: State, turn: Turn) -> Metrics:
        """Answer as the family does; in the last round also test on the stream's images before their harm.

        ``clean-accuracy`` is the student's, by batch statistics; ``source-clean-accuracy`` that of the untouched source
        model, by the statistics it came with.
        """
        metrics = super().answer(action, model, data, state, turn)
        if action == "stream" and turn.round == turn.num_rounds:
            shuffled = data.test.subset(_drawn(data.test, len(data.test), turn.generator))
            with batchnorm.batch_statistics(model):
                metrics["clean-accuracy"] = self.evaluate(model, shuffled, turn)["accuracy"]
            source = copy.deepcopy(model)
            self._deploy(source, state, turn)
            metrics["source-clean-accuracy"] = self.evaluate(source, shuffled, turn)["accuracy"]
        return metrics


class Adapting:
    """All that one client's turn works with: student, teacher, projector, optimizer, prototypes, source, stream.

    Args:
        config: the trainer's.
        model: the source model; student and teacher begin as its copies.
        source: the client's labelled source examples.
        lens: the client's stream, for its way between pixels and inputs.
        kept: what ``state`` returned at the end of the last turn.
    """

    def __init__(
        self, config: Rmt.Config, model: nn.Module, source: Split, lens: Stream, kept: State | None = None
    ) -> None:
        self.config, self.source, self.lens = config, source, lens
        width = int(model.head.in_features)  # type: ignore[union-attr, arg-type]
        self.student = copy.deepcopy(model).eval().requires_grad_(True)
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        self.projector = nn.Sequential(
            nn.Linear(width, config.projector), nn.ReLU(), nn.Linear(config.projector, config.projector)
        ).to(next(model.parameters()).device)
        self.prototypes = torch.empty(0, width)
        if kept is not None:
            self.prototypes = kept["prototypes"]
            for name in ("student", "teacher", "projector"):
                getattr(self, name).load_state_dict(kept[name])
        trained = [*self.student.parameters(), *self.projector.parameters()]
        self.optimizer = torch.optim.Adam(
            trained, lr=config.lr, betas=(config.beta1, 0.999), weight_decay=config.weight_decay
        )
        if kept is not None:
            self.optimizer.load_state_dict(kept["optimizer"])

    def step(self, loss: Tensor) -> None:
        """Take one step of the student; the teacher follows in its parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.mul_(self.config.teacher_momentum).add_(fast, alpha=1 - self.config.teacher_momentum)

    def state(self) -> State:
        models = {name: getattr(self, name).state_dict() for name in ("student", "teacher", "projector")}
        return {**models, "optimizer": self.optimizer.state_dict(), "prototypes": self.prototypes}


def surprise(a: Tensor, b: Tensor) -> Tensor:
    """Return the cross-entropy S(a, b) of two rows of logits: what b's probabilities make of a's, ``(n,)``."""
    return -(b.softmax(1) * a.log_softmax(1)).sum(1)


@torch.no_grad()
def prototypes(model: nn.Module, source: Split, classes: int, generator: torch.Generator) -> Tensor:
    """Return the mean features of each class that a source split has, ``(classes present, D)``.

    Batches normalise by their own statistics, as those of the stream will. Their order is drawn: of examples that are
    stored class by class, a batch in order would have the statistics of one class.
    """
    model.eval()
    shuffled = source.subset(_drawn(source, len(source), generator))
    size = math.ceil(len(source) / math.ceil(len(source) / 256))  # even batches: a last one of few has poor statistics
    batches = list(in_order(shuffled, size))
    with batchnorm.batch_statistics(model):
        z = torch.cat([model.features(batch.x) for batch in batches])  # type: ignore[operator]
    y = torch.cat([batch.y for batch in batches])
    return torch.stack([z[y == label].mean(0) for label in range(classes) if bool((y == label).any())])


def nearest(features: Tensor, among: Tensor) -> Tensor:
    """Return for each of the features ``(n, D)`` the prototype of the largest cosine, ``(n, D)``."""
    return among[(F.normalize(features, dim=1) @ F.normalize(among, dim=1).T).argmax(1)]


def contrast(views: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss of ``(views, n, D)``: every vector is an anchor, its other views are its positives.

    All other vectors stand in the denominator, those of samples of the same class too.
    """
    count, n, _ = views.shape
    z = F.normalize(views.flatten(0, 1), dim=1)
    itself = torch.eye(count * n, dtype=torch.bool, device=z.device)
    log = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = torch.eye(n, dtype=torch.bool, device=z.device).repeat(count, count) & ~itself
    return -log[positive].mean()


def _drawn(split: Split, count: int, generator: torch.Generator) -> Tensor:
    """Draw positions of a split without repetition, as many as asked or as there are."""
    return torch.randperm(len(split), generator=generator)[:count].to(split.rows.device)
