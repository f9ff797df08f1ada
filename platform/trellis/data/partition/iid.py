"""Equal shares at random."""

from __future__ import annotations

from typing import Any

from trellis.data.partition._base import Deal, PartitionConfig, Partitioner
from trellis.registry import register


@register("partitioners", "iid", summary="equal shares at random")
class Iid(Partitioner):
    """Every client gets the same number of examples, give or take one, drawn at random."""

    class Config(PartitionConfig):
        pass

    config: Config

    def flower(self, deal: Deal) -> Any:
        from flwr_datasets.partitioner import IidPartitioner

        return IidPartitioner(num_partitions=deal.clients)
