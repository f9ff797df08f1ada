"""iCaRL with many clients: a few images of every class are kept, and the nearest mean of them classifies."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from trellis.data.base import Split
from trellis.registry import register
from trellis_clients.trainer import Metrics, Turn, in_order
from trellis_clients.trainers.reconnaissance._recon import (
    EXEMPLARS,
    Recon,
    ReconConfig,
    ReconModel,
    chunks,
    examples,
    labelled,
    labels_of,
)


@register(
    "trainers",
    "recon-icarl",
    paper="Rebuffi et al., iCaRL: Incremental Classifier and Representation Learning, CVPR 2017",
    takes=("image", "vector"),
    sends="missions",
    payload="weights, prototypes, exemplars",
    replies=("evidence", "exemplars"),
    strategies=("reconnaissance",),
)
class ReconIcarl(Recon):
    """iCaRL, extended to many clients as Hendryx et al. do.

    A client trains on its mission's images and the exemplars it was sent: one sigmoid per class, the mission's
    classes against their labels, all other known ones against the outputs of the model before (iCaRL, algorithm 3).
    It returns its weights and the mission's exemplars. The cloud averages the weights, pools the exemplars, trims them
    by herding (algorithm 4) to ``budget`` over all classes, trains on them, and classifies by the nearest mean of the
    exemplars' normalised features (algorithm 1).
    """

    class Config(ReconConfig):
        budget: Annotated[int, Field(ge=1)] = Field(400, description="exemplars kept in all; one a class at least")
        merge_epochs: Annotated[int, Field(ge=0)] = Field(5, description="the cloud's passes over the exemplars")

    config: Config
    uploads = ("arrays", EXEMPLARS)

    def travels(self, name: str) -> bool:  # noqa: ARG002
        return True

    def objective(self, model: ReconModel, x: Tensor, y: Tensor, known: Tensor) -> Tensor:
        """Return the sum over known classes of binary cross-entropies, mean over the examples."""
        targets = F.one_hot(y, len(known)).float()
        return binary(model.net(x), targets, known)

    def learn(self, model: ReconModel, seen: Split, turn: Turn) -> Metrics:
        """Train on new images and exemplars with distillation; send the weights and up to a class's share of images."""
        kept = turn.received.get(EXEMPLARS, {})
        own = examples(seen)
        parts = [own, kept] if len(kept.get("y", ())) else [own]
        split = labelled(parts)
        fresh = torch.zeros_like(model.known)
        fresh[own["y"]] = True
        known = model.known | fresh
        teacher = self._outputs(model, split)
        optimizer = self.optimizer(model, turn)
        model.train()
        total, count = torch.zeros((), device=self.task.device), 0
        for _ in range(self.config.local_epochs):
            for index in chunks(torch.randperm(len(split), generator=turn.generator), self.config.batch_size):
                batch = split.batch(index.to(split.rows.device))
                if len(batch) < 2:
                    continue
                targets = torch.where(fresh, F.one_hot(batch.y, len(known)).float(), teacher[batch.index])
                optimizer.zero_grad(set_to_none=True)
                loss = binary(model.net(batch.x), targets, known)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach() * len(batch)
                count += len(batch)
        chosen = self._herded(model, seen, int(known.sum()))
        self._set_means(model, split)
        turn.reply["arrays"] = self.shared(model)
        turn.reply[EXEMPLARS] = examples(seen.subset(chosen))
        return {"loss": float(total) / max(count, 1)}

    def consolidate(self, model: ReconModel, pool: Split, turn: Turn) -> tuple[Metrics, Tensor | None]:
        """Trim the pool by herding, train on it (not in the first round), and set the means of the exemplars."""
        metrics: Metrics = {}
        kept = self._herded(model, pool, int(model.known.sum()))
        exemplars = pool.subset(kept)
        if turn.round > 1 and self.config.merge_epochs:
            optimizer = self.optimizer(model, turn)
            epochs = self.config.merge_epochs
            merged = self.supervised(model, exemplars, turn, optimizer, model.known, epochs)
            metrics = {"loss-merge": merged["loss"]}
        self._set_means(model, exemplars)
        return metrics, kept

    def logits(self, model: ReconModel, x: Tensor) -> Tensor:
        return F.normalize(model.features(x), dim=1) @ model.table.T

    @torch.no_grad()
    def _outputs(self, model: ReconModel, split: Split) -> Tensor:
        model.eval()
        return torch.cat([model.net(batch.x) for batch in in_order(split, 256)]).sigmoid()

    @torch.no_grad()
    def _set_means(self, model: ReconModel, exemplars: Split) -> None:
        """Set the table to the normalised means of normalised features, of the classes that have exemplars."""
        features = F.normalize(self.embedded(model, exemplars), dim=1)
        y = exemplars.fields["y"][exemplars.rows]
        for label in labels_of(exemplars):
            model.table[label] = F.normalize(features[y == label].mean(0), dim=0)

    @torch.no_grad()
    def _herded(self, model: ReconModel, split: Split, num_known: int) -> Tensor:
        """Return positions of each class's exemplars, the most typical first: their mean follows the class's mean."""
        share = max(1, self.config.budget // max(num_known, 1))
        features = F.normalize(self.embedded(model, split), dim=1)
        y = split.fields["y"][split.rows]
        return torch.cat([herd(features, (y == label).nonzero()[:, 0], share) for label in labels_of(split)])


def binary(logits: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """Return binary cross-entropy, summed over known classes and averaged over examples."""
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * known).sum(1).mean()


def herd(features: Tensor, members: Tensor, size: int) -> Tensor:
    """Return up to ``size`` of the members, each chosen so that the mean of those chosen is nearest the mean of all.

    Args:
        features: ``(n, D)``.
        members: positions of one class, ``(m,)``.
        size: how many.
    """
    own = features[members]
    target, total = own.mean(0), torch.zeros_like(own[0])
    chosen: list[int] = []
    free = torch.ones(len(own), dtype=torch.bool, device=own.device)
    for count in range(1, min(size, len(own)) + 1):
        distances = (target - (total + own) / count).square().sum(1).masked_fill(~free, torch.inf)
        best = int(distances.argmin())
        chosen.append(best)
        free[best] = False
        total = total + own[best]
    return members[chosen]
