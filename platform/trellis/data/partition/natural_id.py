"""One client per user, writer or site that the data know of."""

from __future__ import annotations

from typing import Any

from trellis.data.base import DataSet
from trellis.data.partition._base import Deal, PartitionConfig, Partitioner
from trellis.errors import DataError
from trellis.registry import register


@register("partitioners", "natural-id", summary="one client per user or site that the data know of")
class NaturalId(Partitioner):
    """Clients are the data's own ids, in alphabetical order. The seed moves only their test splits."""

    class Config(PartitionConfig):
        pass

    config: Config
    knobs = ("partition.min_examples",)

    def count(self, data: DataSet, clients: int | None) -> int:
        if data.natural_id is None:
            raise DataError("partition-ids", f"{self.name}: these data do not say whom an example came from")
        found = len(set(data.natural_id))
        if clients is not None and clients != found:
            raise DataError(
                "partition-clients", f"clients is {clients}, but the data hold {found} ids; leave clients out"
            )
        return found

    def flower(self, deal: Deal) -> Any:
        del deal  # the config or the data say it all
        from flwr_datasets.partitioner import NaturalIdPartitioner

        return NaturalIdPartitioner(partition_by="id")
