"""Shards of the data sorted by label."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from trellis.data.partition._base import Deal, PartitionConfig, Partitioner
from trellis.registry import register


@register("partitioners", "shard", summary="shards of the data sorted by label", paper="arXiv 1602.05629")
class Shard(Partitioner):
    """Sort by label, cut into shards of equal size, give every client the same number of shards at random.

    As in McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
    2017, section 3. Where the examples do not divide evenly, the rest makes further shards, which go to the first
    clients one each, so that no example is lost.
    """

    class Config(PartitionConfig):
        shards_per_client: int = Field(2, ge=1)

    config: Config
    knobs = ("partition.shards_per_client", "clients")
    labelled = True

    def flower(self, deal: Deal) -> Any:
        from flwr_datasets.partitioner import ShardPartitioner

        return ShardPartitioner(
            num_partitions=deal.clients,
            partition_by="label",
            shard_size=max(deal.rows // (deal.clients * self.config.shards_per_client), 1),
            keep_incomplete_shard=True,
            seed=deal.seed,
        )
