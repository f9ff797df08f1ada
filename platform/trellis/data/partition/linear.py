"""Size skew: size of client k proportional to k + 1."""

from __future__ import annotations

from typing import Any

from trellis.data.partition._base import Deal, PartitionConfig, Partitioner
from trellis.registry import register


@register("partitioners", "linear", summary="sizes grow with the client's number")
class Linear(Partitioner):
    """Client k's size is proportional to k + 1; labels stay mixed. The last client gets what rounding leaves."""

    class Config(PartitionConfig):
        pass

    config: Config

    def flower(self, deal: Deal) -> Any:
        from flwr_datasets.partitioner import LinearPartitioner

        return LinearPartitioner(num_partitions=deal.clients)
