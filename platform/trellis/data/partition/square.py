"""Size skew: size of client k proportional to (k + 1) squared."""

from __future__ import annotations

from typing import Any

from trellis.data.partition._base import Deal, PartitionConfig, Partitioner
from trellis.registry import register


@register("partitioners", "square", summary="sizes grow with the square of the client's number")
class Square(Partitioner):
    """Client k's size is proportional to (k + 1)²; labels stay mixed. The last client gets what rounding leaves."""

    class Config(PartitionConfig):
        pass

    config: Config

    def flower(self, deal: Deal) -> Any:
        from flwr_datasets.partitioner import SquarePartitioner

        return SquarePartitioner(num_partitions=deal.clients)
