"""Prediction-time batch norm: normalise by the batch at hand, mixed with the source's statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from trellis.errors import DataError
from trellis_clients.edge.adapters._base import Adapter, Options, Reader, State
from trellis_clients.edge.predictor import Array, Prediction

STATISTICS = "statistics."


@runtime_checkable
class MovesStatistics(Protocol):
    """A predictor that can start from other statistics than its own, which ``moving`` asks for."""

    def statistics(self) -> dict[str, Array]:
        """Return copies of mean and variance of every batch norm, by their names in the state dict."""
        ...

    def moved(
        self, x: NDArray[Any], statistics: Mapping[str, Array], prior: float
    ) -> tuple[Prediction, dict[str, Array]]:
        """Predict with these in place of the source's statistics; return also the mixed ones that were used."""
        ...


class PredictionBnOptions(Options):
    """Options of prediction-time batch norm. N = 16 suits batches from 8 to 512 (Schneider et al., section 4)."""

    prior: float | None = Field(
        16.0, ge=0, description="N, examples that the source's statistics count for; 0: batch only; null: source only"
    )
    weight: float | None = Field(
        None, gt=0, le=1, description="share of the batch, whatever its size, in place of the prior; 0.1 is in use"
    )
    moving: bool = Field(False, description="each batch mixes into the statistics that the batch before ended with")

    @model_validator(mode="after")
    def _moves(self) -> PredictionBnOptions:
        if self.moving and self.prior is None and self.weight is None:
            raise ValueError("moving needs a finite prior or a weight: with prior null no batch is ever mixed in")
        return self

    def prior_of(self, n: int) -> float | None:
        """Return N for a batch of n: a fixed share w of the batch is a prior of ``n (1 - w) / w``."""
        return self.prior if self.weight is None else n * (1 - self.weight) / self.weight


class PredictionBatchNorm(Adapter):
    """Nado et al., arXiv 2006.10963 (``prior: 0``); Schneider et al., NeurIPS 2020, section 3 (``prior: N``).

    Every batch norm normalises a batch of n by ``N/(N+n) source + n/(N+n) batch``, of means and of biased variances,
    over examples and pixels. Scale and shift are as they were, the source's statistics too: nothing is carried, unless
    ``moving`` puts the mixed statistics in the source's place for the next batch.

    Where it fails: with few examples on small maps the batch's statistics are noise (at one example on a 1x1 map the
    variance is 0), which a prior repairs; but under a strong shift the prior brings back statistics that are wrong. On
    digits of 16x16, where even one picture is 256 pixels, N = 0 beat N = 16 by 46 points at n = 2 under corruption, and
    lost to it by 0.5 on clean pictures (``benchmarks/claims/forward_only_tta.py``). A batch of one or two classes or
    of several domains has statistics of its own that no longer say what changed in the pictures; this can cost
    more than adaptation gains (digits sorted by class lost 2 points). Models without batch norm cannot be adapted so.
    """

    class Config(PredictionBnOptions):
        """Nothing beyond."""

    name = "prediction-bn"
    config: Config

    def check(self) -> None:
        """Raise where there is no batch norm, or the statistics cannot be moved."""
        if not self.predictor.has_batch_norm:
            raise DataError(
                "adapter-batch-norm", "adapter 'prediction-bn' needs a model with batch normalisation; this has none"
            )
        if self.config.moving and not isinstance(self.predictor, MovesStatistics):
            raise DataError(
                "adapter-batch-norm",
                "adapter 'prediction-bn' with moving=true needs a model whose statistics can be replaced; "
                "this one's are fixed",
            )

    def reset(self) -> None:
        """Go back to the source's statistics."""
        self._statistics: dict[str, Array] | None = None

    def predict(self, x: NDArray[Any]) -> Array:
        """Answer a batch under its own mix of statistics."""
        prior = self.config.prior_of(len(x))
        if not self.config.moving:
            return self.forward(x, prior=prior).logits
        assert isinstance(self.predictor, MovesStatistics)
        assert prior is not None
        before = self.predictor.statistics() if self._statistics is None else self._statistics
        prediction, self._statistics = self.predictor.moved(x, before, prior)
        self.forwards += len(x)
        return prediction.logits

    def kept(self) -> State:
        """Return the moving statistics, once there are some."""
        return {STATISTICS + name: values.copy() for name, values in (self._statistics or {}).items()}

    def restore(self, reader: Reader) -> None:
        """Take back the moving statistics."""
        found: dict[str, Array] | None = None
        if self.config.moving and reader.values:
            assert isinstance(self.predictor, MovesStatistics)
            like = self.predictor.statistics()
            found = {name: reader.array(STATISTICS + name, v.shape, np.float32) for name, v in like.items()}
        reader.done()
        self._statistics = found
