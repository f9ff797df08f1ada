"""What every adapter is: a model seen through ``Predictor``, a stream in order, and what it keeps between batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from trellis.errors import DataError
from trellis_clients.edge.predictor import Array, Prediction, Predictor

Value = NDArray[Any] | int | float | str
State = dict[str, Value]
Double = NDArray[np.float64]

NAME = "adapter"
"""Key of a state that says whose it is."""


class Options(BaseModel):
    """What can be set of an adapter. Unknown keys, wrong types, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Adapter(ABC):
    """Answers a stream batch by batch, and carries what it learns from one batch to the next.

    Everything it carries is in ``state()``: with it, another process goes on to the same bits. A call that raises
    leaves the state as it was.

    Args:
        config: options; ``Config`` of the class.
        predictor: the model. It is used as it is at each call.

    Raises:
        DataError: the model lacks what the adapter changes.

    Attributes:
        name: in ``adapters.create``.
        forwards: examples that went through the model so far, each as often as it did.
    """

    class Config(Options):
        """No options."""

    name: ClassVar[str]

    def __init__(self, config: Any, predictor: Predictor) -> None:
        self.config = config
        self.predictor = predictor
        self.forwards = 0
        self.check()
        self.reset()

    @abstractmethod
    def predict(self, x: NDArray[Any]) -> Array:
        """Answer the next batch of the stream.

        Args:
            x: preprocessed examples ``(n, *shape)``, float32, n at least 1.

        Returns:
            Logits ``(n, classes)``; their softmax is the adapter's answer.

        Raises:
            TrellisError: the batch is not what the model takes.
        """

    def check(self) -> None:  # noqa: B027
        """Raise ``DataError`` where the model lacks what the adapter changes."""

    def reset(self) -> None:  # noqa: B027
        """Forget the stream; what came from clean examples stays."""

    def weights_changed(self) -> None:
        """Drop whatever described the model's old weights. To be called after they were replaced."""
        self.reset()

    # -- clean examples -------------------------------------------------------------------------------

    @property
    def needs_source(self) -> bool:
        """Whether ``prepare`` must be called before the first batch."""
        return False

    def prepare(self, x: NDArray[Any]) -> None:  # noqa: B027
        """Look at clean, unlabeled examples ``(n, *shape)`` of the source, where the method needs them.

        Raises:
            DataError: there are too few.
        """

    # -- what is kept ---------------------------------------------------------------------------------

    def state(self) -> State:
        """Return copies of all that later answers depend on: arrays, numbers and text under plain names."""
        return {NAME: self.name, **self.kept()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that ``state()`` gave, for the same model and options. All or nothing.

        Raises:
            DataError: the state is of another adapter, of another model's or option's shape, or damaged.
        """
        reader = Reader(self.name, state)
        if reader.values.pop(NAME, None) != self.name:
            raise DataError("adapter-state", f"this state is of adapter {state.get(NAME)!r}, not of {self.name!r}")
        self.restore(reader)

    def kept(self) -> State:
        """Return the entries of ``state()`` beside the name."""
        return {}

    def restore(self, reader: Reader) -> None:
        """Take back what ``kept`` gave."""
        reader.done()

    def metrics(self) -> dict[str, float]:
        """Return figures about the last batch and what is kept, for displays."""
        return {}

    # -- the model ------------------------------------------------------------------------------------

    def forward(self, x: NDArray[Any], **inputs: Any) -> Prediction:
        """Run the model on a batch, and count it."""
        prediction = self.predictor(x, **inputs)
        self.forwards += len(x)
        return prediction


class Reader:
    """Takes a state apart, and says what is wrong with it."""

    def __init__(self, owner: str, state: Mapping[str, Any]) -> None:
        self.owner = owner
        self.values = dict(state)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def array(self, name: str, shape: tuple[int | None, ...], dtype: type = np.float64) -> NDArray[Any]:
        """Take an array of the given shape, None for any length; a copy that may be written to."""
        values = np.array(self._take(name))
        fits = len(values.shape) == len(shape) and all(b in (None, a) for a, b in zip(values.shape, shape, strict=True))
        if not fits or values.dtype.kind not in "fiu":
            wanted = tuple("any" if size is None else size for size in shape)
            self.fail(f"{name!r} is {values.dtype} of shape {values.shape}, not of {wanted}")
        if not np.isfinite(values).all():
            self.fail(f"{name!r} is not finite")
        return values.astype(dtype)

    def number(self, name: str, least: float = -np.inf) -> float:
        """Take a finite number."""
        value = self._take(name)
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
            self.fail(f"{name!r} is {value!r}, not a number")
        if value < least:
            self.fail(f"{name!r} is {value!r}, below {least:g}")
        return float(value)

    def count(self, name: str) -> int:
        """Take a whole number, at least 0."""
        value = self.number(name, 0)
        if value != int(value):
            self.fail(f"{name!r} is {value!r}, not a whole number")
        return int(value)

    def done(self) -> None:
        """Refuse what nobody took."""
        if self.values:
            self.fail(f"nothing is called {sorted(self.values)[0]!r}")

    def fail(self, reason: str) -> None:
        """Raise the error that a state deserves."""
        raise DataError("adapter-state", f"state of adapter {self.owner!r}: {reason}")

    def _take(self, name: str) -> Any:
        if name not in self.values:
            self.fail(f"{name!r} is missing")
        return self.values.pop(name)


def log_softmax(logits: NDArray[Any]) -> Double:
    """Return the logarithm of the softmax over the last axis, float64."""
    below = np.asarray(logits, np.float64) - logits.max(-1, keepdims=True)
    result: Double = below - np.log(np.exp(below).sum(-1, keepdims=True))
    return result


def entropy(logits: NDArray[Any]) -> Double:
    """Return the Shannon entropy in nats of the softmax of logits ``(n, classes)``; shape ``(n,)``."""
    log = log_softmax(logits)
    result: Double = -(np.exp(log) * log).sum(-1)
    return result


def normalised(rows: NDArray[Any]) -> Double:
    """Return rows of Euclidean length 1; a row of zeros stays."""
    rows = np.asarray(rows, np.float64)
    result: Double = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    return result
