"""Federated prototypical networks: a mission is a few averages of embeddings, and merging forgets nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.data.base import Batch, Split
from trellis.errors import DataError
from trellis.registry import register
from trellis_clients.trainer import Metrics, Turn
from trellis_clients.trainers.reconnaissance._recon import Recon, ReconConfig, ReconModel, labels_of


@register(
    "trainers",
    "recon-protonet",
    paper="Hendryx et al., Federated Reconnaissance: Efficient, Distributed, Class-Incremental Learning, 2021",
    takes=("image", "vector"),
    sends="missions",
    payload="prototypes",
    replies=("evidence",),
    strategies=("reconnaissance",),
)
class ReconProtonet(Recon):
    """Prototypical networks in federated reconnaissance (section 4).

    The encoder is meta-trained once on the base classes by N-way K-shot episodes (Snell et al., 2017, algorithm 1) and
    then frozen. Learning a class is averaging its embeddings; clients send means and counts of what is new, never
    cumulative ones, so that the cloud's merge is exact. A query belongs to the nearest prototype by squared
    Euclidean distance.
    """

    class Config(ReconConfig):
        episodes: Annotated[int, Field(ge=1)] = Field(200, description="of meta-training; the paper's code: 50,000")
        ways: Annotated[int, Field(ge=2)] = Field(10, description="classes of an episode; all base classes if fewer")
        shots: Annotated[int, Field(ge=1)] = Field(5, description="support examples of a class")
        queries: Annotated[int, Field(ge=1)] = Field(5, description="query examples of a class")

    config: Config
    sends_means = True

    def travels(self, name: str) -> bool:
        return not name.startswith("net.head.")

    def learn_base(self, model: ReconModel, split: Split, turn: Turn) -> Metrics:
        """Meta-train the encoder by Adam; return the mean query ``loss`` of the last quarter of the episodes."""
        encoder = [p for name, p in model.net.named_parameters() if not name.startswith("head.")]
        optimizer = torch.optim.Adam(encoder, lr=self.config.base_lr)
        losses = []
        model.train()
        for episode in self.episodes(split, turn):
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss(model, episode, turn)
            loss.backward()  # type: ignore[no-untyped-call]
            self.adjust_gradients(model, {}, turn)
            optimizer.step()
            losses.append(loss.detach())
        return {"loss": float(torch.stack(losses)[-max(1, len(losses) // 4) :].mean())}

    def episodes(self, split: Split, turn: Turn) -> Iterator[Batch]:
        """Yield episodes: ``ways`` classes, of each ``shots + queries`` examples, those of a class in a row.

        Classes with fewer examples take no part.

        Raises:
            DataError: fewer than two classes have enough examples.
        """
        each = self.config.shots + self.config.queries
        labels = split.fields["y"][split.rows].cpu()
        members = [rows for label in labels_of(split) if len(rows := (labels == label).nonzero()[:, 0]) >= each]
        if len(members) < 2:
            raise DataError(
                "recon-episodes",
                f"{len(members)} base classes have the {each} examples that an episode takes"
                f" (trainer.shots {self.config.shots} + trainer.queries {self.config.queries}); it takes two classes",
            )
        for _ in range(self.config.episodes):
            ways = torch.randperm(len(members), generator=turn.generator)[: self.config.ways]
            drawn = [members[way][torch.randperm(len(members[way]), generator=turn.generator)[:each]] for way in ways]
            yield split.batch(torch.cat(drawn).to(split.rows.device))

    def batches(self, split: Split, turn: Turn) -> Iterator[Batch]:
        """Yield the episodes of the base examples of a split."""
        return self.episodes(self.base_split(split), turn)

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:  # noqa: ARG002
        """Return the query loss of an episode: cross-entropy over -||f(x) - p_c||^2 (gradients through both)."""
        assert isinstance(model, ReconModel)
        each = self.config.shots + self.config.queries
        embedded = model.features(batch.x).view(len(batch) // each, each, -1)
        prototypes = embedded[:, : self.config.shots].mean(1)
        queries = embedded[:, self.config.shots :].flatten(0, 1)
        targets = torch.arange(len(prototypes), device=queries.device).repeat_interleave(self.config.queries)
        return F.cross_entropy(-squared_distances(queries, prototypes), targets)

    def learn(self, model: ReconModel, seen: Split, turn: Turn) -> Metrics:  # noqa: ARG002
        """Do nothing: the encoder is frozen, and the evidence is all there is to send."""
        return {}

    def remember(self, model: ReconModel, evidence: Mapping[str, Tensor]) -> None:
        """Update the copy by the running mean p += b / (n + b) · (m - p)."""
        labels = evidence["labels"]
        super().remember(model, evidence)
        share = (evidence["counts"] / model.counts[labels])[:, None]
        model.table[labels] += share * (evidence["means"] - model.table[labels])

    def logits(self, model: ReconModel, x: Tensor) -> Tensor:
        return -squared_distances(model.features(x), model.table)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return ||x_i - y_j||^2, shape ``(len(x), len(y))``."""
    return (x[:, None] - y[None]).square().sum(2)
