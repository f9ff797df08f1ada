"""No adaptation: the model as it is."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from trellis_clients.edge.adapters._base import Adapter
from trellis_clients.edge.predictor import Array


class Unadapted(Adapter):
    """What every adapter is compared with."""

    name = "none"

    def predict(self, x: NDArray[Any]) -> Array:
        """Return the model's own logits."""
        return self.forward(x).logits
