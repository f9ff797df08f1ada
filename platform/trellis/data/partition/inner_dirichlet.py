"""Label skew at equal sizes, by a Dirichlet draw per client."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from trellis.data.partition._base import Deal, PartitionConfig, Partitioner
from trellis.registry import register


@register("partitioners", "inner-dirichlet", summary="label skew at equal sizes", paper="arXiv 2111.04263")
class InnerDirichlet(Partitioner):
    """For each client, draw its mix of classes from a symmetric Dirichlet distribution; all clients are of one size.

    A class that runs out is taken out of everybody's mix. As in Acar et al., "Federated Learning Based on Dynamic
    Regularization", ICLR 2021.
    """

    class Config(PartitionConfig):
        alpha: float = Field(0.5, gt=0, description="concentration; smaller is more skewed")

    config: Config
    knobs = ("partition.alpha", "clients")
    labelled = True

    def flower(self, deal: Deal) -> Any:
        from flwr_datasets.partitioner import InnerDirichletPartitioner

        share, rest = divmod(deal.rows, deal.clients)
        return InnerDirichletPartitioner(
            partition_sizes=[share + (client < rest) for client in range(deal.clients)],
            partition_by="label",
            alpha=self.config.alpha,
            seed=deal.seed,
        )
