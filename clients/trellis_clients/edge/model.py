"""A model as it is served: what predicts, and what its file says of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trellis.errors import DataError
from trellis_clients.edge.predictor import Predictor
from trellis_clients.edge.preprocessing import Preprocessing


@dataclass(frozen=True)
class Model:
    """A predictor under a name.

    Attributes:
        predictor: what answers.
        name: under which clients ask for it.
        fingerprint: of the file; a state that was kept belongs to one model.
        preprocessing: of pixels; None where the model does not take images.
        input_name: of its one input, for clients.
        weights: digest of the weights that it was made from; None where its file does not say.
    """

    predictor: Predictor
    name: str
    fingerprint: str
    preprocessing: Preprocessing | None = None
    input_name: str = "input"
    weights: str | None = None

    def check(self) -> None:
        """Predict one example of zeros.

        Raises:
            DataError: the answer does not have the promised shape, or is not finite.
        """
        found = self.predictor(np.zeros((1, *self.predictor.shape), np.float32)).logits
        wanted = (1, len(self.predictor.classes))
        if found.shape != wanted or not np.isfinite(found).all():
            raise DataError(
                "edge-model", f"model {self.name!r} answers zeros with shape {found.shape}, expected finite {wanted}"
            )
