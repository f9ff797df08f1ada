"""A few classes per client."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from trellis.data.base import DataSet
from trellis.data.partition._base import Deal, PartitionConfig, Partitioner, Rows
from trellis.errors import DataError
from trellis.registry import register


@register("partitioners", "pathological", summary="a fixed number of classes per client", paper="arXiv 2006.08848")
class Pathological(Partitioner):
    """Every client gets the same number of classes; the examples of a class are shared evenly by its clients.

    As in Dinh et al., "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020. A class that no
    client was given is an error, unless ``unused_classes`` says to leave its examples out.
    """

    class Config(PartitionConfig):
        classes_per_client: int = Field(2, ge=1)
        class_assignment_mode: Literal["random", "deterministic", "first-deterministic"] = Field(
            "first-deterministic",
            description="random; k, k+1, ... for client k; or the first class in turn and the others random",
        )
        unused_classes: Literal["error", "drop"] = "error"

    config: Config
    knobs = ("partition.classes_per_client", "partition.class_assignment_mode", "clients")
    labelled = True

    def flower(self, deal: Deal) -> Any:
        from flwr_datasets.partitioner import PathologicalPartitioner

        return PathologicalPartitioner(
            num_partitions=deal.clients,
            partition_by="label",
            num_classes_per_partition=self.config.classes_per_client,
            class_assignment_mode=self.config.class_assignment_mode,
            seed=deal.seed,
        )

    def parts(self, data: DataSet, clients: int, seed: int) -> list[Rows]:
        parts = super().parts(data, clients, seed)
        unused = np.setdiff1d(data.labels(), data.labels()[np.concatenate(parts)])
        if len(unused) and self.config.unused_classes == "error":
            raise DataError(
                "partition-incomplete",
                f"{self.name}: no client was given class {data.classes[int(unused[0])]!r} ({len(unused)} such classes);"
                f" change {' or '.join(self.knobs)}, or set partition.unused_classes to 'drop'",
            )
        return parts
