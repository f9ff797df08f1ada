"""No data at all, for numerical experiments: trainers whose objective is a formula."""

from __future__ import annotations

import torch

from trellis.data.base import DataSet, Split
from trellis.data.sets._base import Source
from trellis.registry import register
from trellis.scenario import Strict


@register("datasets", "none", summary="no data, for numerical experiments", kind="none")
class NoData(Source):
    """Empty tensors. Every partitioner deals every client an empty split, at no cost per client."""

    class Config(Strict):
        pass

    config: Config

    def load(self, seed: int) -> DataSet:
        del seed
        empty = Split.whole(x=torch.empty(0), y=torch.empty(0, dtype=torch.int64))
        return DataSet(kind="none", train=empty, test=empty)
