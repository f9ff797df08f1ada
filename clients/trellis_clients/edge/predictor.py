"""What every adapter that only looks forward needs of a model, whatever runs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trellis.errors import TrellisError, listed, nearest

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """What a model says of a batch of n examples.

    Attributes:
        logits: ``(n, classes)``.
        features: ``(n, D)``, what the last linear layer sees, before any shift.
        activations: ``(n, L, D)``, transformers only: the class token after each of L blocks, through the first
            norm of the block that follows, or through the final norm after the last.
    """

    logits: Array
    features: Array
    activations: Array | None


class Predictor(Protocol):
    """A classifier that runs forward only. Same numbers from torch and ONNX Runtime, to rounding.

    Attributes:
        classes: names, in the order of the logits.
        shape: of one example, without the batch.
        head: weight ``(classes, D)`` and bias ``(classes,)`` of the last linear layer.
        prompt_width: D of a prompt token; None where the model takes no prompts.
        has_batch_norm: whether ``prior`` has an effect.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def head(self) -> tuple[Array, Array]: ...

    @property
    def prompt_width(self) -> int | None: ...

    @property
    def has_batch_norm(self) -> bool: ...

    def __call__(
        self,
        x: NDArray[Any],
        *,
        prior: float | None = None,
        prompts: NDArray[Any] | None = None,
        shift: NDArray[Any] | None = None,
    ) -> Prediction:
        """Predict a batch of preprocessed examples ``(n, *shape)``, n at least 1.

        Args:
            x: the batch, float32.
            prior: N, how many examples the source's statistics count for. Every batch norm normalises by
                ``(N * source + n * batch) / (N + n)``, of means and of biased variances alike (Schneider et al.,
                NeurIPS 2020, section 3). None: by the source's alone.
            prompts: ``(P, prompt_width)`` tokens, inserted once behind the class token after positions were added.
            shift: ``(D,)``, added to the features before the head; the returned features are without it.

        Raises:
            TrellisError: an argument has another shape, is not finite, or is not for this model.
        """
        ...

    def affine(self) -> dict[str, Array]:
        """Return copies of scale and shift of every normalisation layer, by their names in the state dict."""
        ...

    def load_affine(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace scale and shift of the named layers; the others stay. All or nothing.

        Raises:
            TrellisError: a name is unknown, a shape differs, or a value is not finite.
        """
        ...


@dataclass(frozen=True)
class Inputs:
    """The arguments of a call, checked: float32, of the right shapes, finite."""

    x: Array
    prior: float | None
    prompts: Array | None
    shift: Array | None


def checked(
    predictor: Predictor, x: Any, prior: float | None, prompts: Any | None = None, shift: Any | None = None
) -> Inputs:
    """Check the arguments of a call against the model.

    Raises:
        TrellisError: one of them has another shape or dtype, is not finite, or is not for this model.
    """
    x = _floats("x", x, "predict-shape")
    if x.ndim != 1 + len(predictor.shape) or x.shape[1:] != predictor.shape or not len(x):
        raise TrellisError(
            "predict-shape",
            f"x has shape {x.shape}; expected (n, {', '.join(map(str, predictor.shape))}) with n at least 1",
        )
    if prior is not None and not (isinstance(prior, int | float) and math.isfinite(prior) and prior >= 0):
        raise TrellisError("predict-prior", f"prior={prior!r}: expected a finite number of at least 0, or None")
    if prompts is not None:
        if predictor.prompt_width is None:
            raise TrellisError("predict-prompts", "this model takes no prompts: it is not a vision transformer")
        prompts = _floats("prompts", prompts, "predict-prompts")
        if prompts.ndim != 2 or prompts.shape[1] != predictor.prompt_width:
            raise TrellisError(
                "predict-prompts", f"prompts have shape {prompts.shape}; expected (P, {predictor.prompt_width})"
            )
    if shift is not None:
        width = predictor.head[0].shape[1]
        shift = _floats("shift", shift, "predict-shift")
        if shift.shape != (width,):
            raise TrellisError("predict-shift", f"shift has shape {shift.shape}; expected ({width},)")
    return Inputs(x, None if prior is None else float(prior), prompts, shift)


def checked_affine(arrays: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Array]:
    """Check new scales and shifts against those there are (anything with a ``shape``).

    Raises:
        TrellisError: a name is unknown, a shape differs, or a value is not finite.
    """
    result = {}
    for name, given in arrays.items():
        if name not in known:
            few = listed(list(known)[:4]) if known else "none: the model has no normalisation layers"
            raise TrellisError(
                "affine-name",
                f"no scale or shift of a normalisation layer is named {name!r}.{nearest(name, known)} There are {few}",
            )
        values, shape = _floats(name, given, "affine-shape"), tuple(known[name].shape)
        if values.shape != shape:
            raise TrellisError("affine-shape", f"{name} has shape {values.shape}; expected {shape}")
        result[name] = values
    return result


def _floats(name: str, given: Any, code: str) -> Array:
    values = np.asarray(given)
    if values.dtype.kind not in "fiub":
        raise TrellisError(code, f"{name} holds {values.dtype} values; expected float32")
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(values, dtype=np.float32).reshape(values.shape)
    if not np.isfinite(values).all():
        raise TrellisError("predict-finite", f"{name} holds a value that is not a finite number")
    return values
