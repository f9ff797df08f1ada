"""A model file in ONNX Runtime as a predictor: numpy and onnxruntime, no torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from trellis.errors import DataError, TrellisError
from trellis_clients.edge.folding import fold
from trellis_clients.edge.model_file import Description, Limits, read
from trellis_clients.edge.moving import mixed_outputs, with_mixed_outputs
from trellis_clients.edge.predictor import Array, Prediction, checked, checked_affine
from trellis_clients.edge.preprocessing import Preprocessing


class OnnxPredictor:
    """A model file as a ``Predictor``. Calls may come from several threads.

    Two sessions serve it. The *fast* one has the batch norms folded into the convolutions; it answers while scale,
    shift and statistics are as folded. The *adaptive* one takes them and the mixing factor as inputs, and so
    ``load_affine`` swaps at once, without a reload; ``refold`` then makes a fast session of what was loaded.

    Args:
        source: path or bytes of a file made by ``trellis export``.
        threads: of ONNX Runtime, for one call.
        limits: what the file may be at most.

    Raises:
        DataError: the file is not there or is refused, see ``trellis_clients.edge.model_file``.
    """

    def __init__(self, source: Path | str | bytes, threads: int = 1, limits: Limits | None = None) -> None:
        if threads < 1 or threads > (os.cpu_count() or 1) * 4:
            raise TrellisError("onnx-threads", f"threads={threads}: expected 1 to {(os.cpu_count() or 1) * 4}")
        self._file = read(source, limits)
        self._threads = threads
        self._head = self._file.head()
        self._defaults: dict[str, Array] = {
            name: self._file.tensor(name).astype(np.float32) for name in self.about.affine
        }
        self._outputs = ["logits", "features", *["activations"] * (self.prompt_width is not None)]
        self._lock = threading.Lock()
        self._overridden: dict[str, Any] = {}
        self._moving: ort.InferenceSession | None = None
        # None once there are affine parameters that it was not folded with.
        self._fast: ort.InferenceSession | None = _session(self._folded({}), threads)
        adapts = self.about.affine or self.about.statistics
        self._adaptive = _session(self._file.blob, threads) if adapts else self._fast

    @property
    def about(self) -> Description:
        """What the file says of itself."""
        return self._file.about

    @property
    def classes(self) -> tuple[str, ...]:
        return self.about.classes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.about.shape

    @property
    def head(self) -> tuple[Array, Array]:
        weight, bias = self._head
        return weight.copy(), bias.copy()

    @property
    def prompt_width(self) -> int | None:
        return self.about.prompts

    @property
    def has_batch_norm(self) -> bool:
        return bool(self.about.statistics)

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images become inputs; None where the file does not say."""
        said = self.about.preprocessing
        try:
            return Preprocessing(tuple(map(float, said["mean"])), tuple(map(float, said["std"])))
        except (KeyError, TypeError, ValueError):
            return None

    def __call__(
        self,
        x: NDArray[Any],
        *,
        prior: float | None = None,
        prompts: NDArray[Any] | None = None,
        shift: NDArray[Any] | None = None,
    ) -> Prediction:
        inputs = checked(self, x, prior, prompts, shift)
        feed: dict[str, Any] = {"x": inputs.x}
        if inputs.prompts is not None:
            feed["prompts"] = inputs.prompts
        if inputs.shift is not None:
            feed["shift"] = inputs.shift
        mixes = inputs.prior is not None and self.has_batch_norm
        if mixes:
            feed["prior"] = np.asarray(inputs.prior, np.float32)
        fast = self._fast  # read once: another thread may swap
        try:
            if fast is not None and not mixes:
                outputs = fast.run(self._outputs, feed)
            else:
                given = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
                found = self._adaptive.run_with_ort_values(self._outputs, {**self._overridden, **given})
                outputs = [value.numpy() for value in found]
        except _ORT_ERRORS as error:
            raise DataError("onnx-run", f"the model does not run on {inputs.x.shape}: {_line(error)}") from None
        return Prediction(outputs[0], outputs[1], outputs[2] if len(outputs) > 2 else None)

    def affine(self) -> dict[str, Array]:
        overridden = self._overridden
        return {
            name: overridden[name].numpy().copy() if name in overridden else default.copy()
            for name, default in self._defaults.items()
        }

    def load_affine(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        new = checked_affine(arrays, self._defaults)
        if not new:
            return
        with self._lock:
            live = {name: ort.OrtValue.ortvalue_from_numpy(values.copy()) for name, values in new.items()}
            self._overridden, self._fast = {**self._overridden, **live}, None

    def refold(self) -> None:
        """Make a fast session of the affine parameters that are loaded now. It may run beside calls, which go on."""
        before = self._overridden
        session = _session(self._folded({name: value.numpy() for name, value in before.items()}), self._threads)
        with self._lock:
            if self._overridden is before:
                self._fast = session

    def _folded(self, affine: Mapping[str, Array]) -> bytes:
        """Return the fast form's bytes. The file is somebody else's: whatever is odd about it is the file's fault."""
        try:
            with np.errstate(all="ignore"):
                return fold(self._file, affine)
        except TrellisError:
            raise
        except Exception as error:
            raise DataError("onnx-damaged", f"the graph is not what an export makes: {_line(error)}") from None

    def statistics(self) -> dict[str, Array]:
        """Return copies of the source's mean and variance of every batch norm, by their names in the state dict."""
        return {name: self._file.tensor(name).astype(np.float32) for name in self.about.statistics}

    def moved(
        self, x: NDArray[Any], statistics: Mapping[str, Array], prior: float
    ) -> tuple[Prediction, dict[str, Array]]:
        """Predict with these in place of the source's statistics; return also the mixed ones that were used.

        A third session serves this, made when first needed; its outputs include the statistics.
        """
        inputs = checked(self, x, prior)
        with self._lock:
            if self._moving is None:
                self._moving = _session(with_mixed_outputs(self._file), self._threads)
            session, overridden = self._moving, self._overridden
        feed = {"x": inputs.x, "prior": np.asarray(inputs.prior, np.float32), **statistics}
        given = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in feed.items()}
        names = mixed_outputs(self._file)
        try:
            outputs = session.run_with_ort_values([*self._outputs, *names.values()], {**overridden, **given})
        except _ORT_ERRORS as error:
            raise DataError("onnx-run", f"the model does not run on {inputs.x.shape}: {_line(error)}") from None
        found = [value.numpy() for value in outputs]
        used = dict(zip(names, found[len(self._outputs) :], strict=True))
        activations = found[2] if len(self._outputs) > 2 else None
        return Prediction(found[0], found[1], activations), used


def _session(blob: bytes, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(blob, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except _ORT_ERRORS as error:
        raise DataError("onnx-load", f"ONNX Runtime does not take the model: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


_ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        kind
        for kind in vars(ort.capi.onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
)
"""ONNX Runtime's own exceptions have no base of their own."""
