"""Label skew by a Dirichlet draw per class."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from trellis.data.base import DataSet
from trellis.data.partition._base import Deal, PartitionConfig, Partitioner, Rows
from trellis.errors import DataError
from trellis.registry import register


@register(
    "partitioners",
    "dirichlet",
    summary="label skew by a Dirichlet draw per class",
    paper="arXiv 1905.12022, 1909.06335",
)
class Dirichlet(Partitioner):
    """For each class, draw the clients' shares of it from a symmetric Dirichlet distribution.

    Small ``alpha`` gives few classes per client and unequal sizes; large ``alpha`` approaches ``iid``. A draw that
    leaves a client with fewer than ``min_examples`` is repeated, up to ten times. After Yurochkin et al., "Bayesian
    Nonparametric Federated Learning of Neural Networks", ICML 2019.
    """

    class Config(PartitionConfig):
        alpha: float = Field(0.5, gt=0, description="concentration; smaller is more skewed")
        self_balancing: bool = Field(False, description="a client at the average size gets no further class")

    config: Config
    knobs = ("partition.alpha", "clients")
    labelled = True

    def flower(self, deal: Deal) -> Any:
        from flwr_datasets.partitioner import DirichletPartitioner

        return DirichletPartitioner(
            num_partitions=deal.clients,
            partition_by="label",
            alpha=self.config.alpha,
            min_partition_size=self.config.min_examples,
            self_balancing=self.config.self_balancing,
            seed=deal.seed,
        )

    def parts(self, data: DataSet, clients: int, seed: int) -> list[Rows]:
        try:
            return super().parts(data, clients, seed)
        except DataError:
            if self.config.min_examples == 0:
                raise
            # No draw gave everybody enough. The first one goes to the check, which names the client that lacks.
            return type(self)(self.config.model_copy(update={"min_examples": 0})).parts(data, clients, seed)
