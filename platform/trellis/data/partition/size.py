"""Sizes given one by one."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from trellis.data.base import DataSet
from trellis.data.partition._base import Deal, PartitionConfig, Partitioner
from trellis.errors import DataError
from trellis.registry import register


@register("partitioners", "size", summary="sizes given one by one")
class Size(Partitioner):
    """Client k gets ``sizes[k]`` examples at random. Examples beyond the sum of the sizes are left out."""

    class Config(PartitionConfig):
        sizes: list[Annotated[int, Field(ge=1)]] = Field(min_length=1, description="examples of each client")

    config: Config
    knobs = ("partition.sizes",)

    def count(self, data: DataSet, clients: int | None) -> int:
        clients = super().count(data, clients)
        sizes = self.config.sizes
        if len(sizes) != clients:
            raise DataError(
                "partition-clients", f"partition.sizes: {len(sizes)} sizes for {clients} clients; give one each"
            )
        if sum(sizes) > len(data.train):
            raise DataError(
                "partition-clients",
                f"partition.sizes: they add up to {sum(sizes)}; the data have {len(data.train)} training examples",
            )
        return clients

    def flower(self, deal: Deal) -> Any:
        del deal  # the config or the data say it all
        from flwr_datasets.partitioner import SizePartitioner

        return SizePartitioner(partition_sizes=self.config.sizes)
