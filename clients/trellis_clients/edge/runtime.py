"""A served model with what adapts it: answers, selects uploads, takes in new parameters, keeps its state.

One batch at a time goes through, in the order of tickets, because adapters carry something from batch to batch. New
affine parameters and new models take a ticket as well: every answer is wholly the old one's or wholly the new one's, no
request is dropped, and once a swap has returned all answers are the new one's.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trellis.errors import DataError, RunError, TrellisError
from trellis_clients.edge import adapters, state
from trellis_clients.edge.decode import Expected
from trellis_clients.edge.metrics import Metrics
from trellis_clients.edge.model import Model
from trellis_clients.edge.selection import Budget, Thresholds, log_softmax
from trellis_clients.edge.turnstile import Turnstile
from trellis_clients.edge.uploads import UploadBuffer

log = logging.getLogger("trellis.edge")

STATE = "state.npz"
AFFINE, ADAPTER = "affine/", "adapter/"


@dataclass(frozen=True)
class Selection:
    """What is uploaded, as CEMA selects; thresholds in units of ln C, defaults the paper's (see ``Thresholds``)."""

    e_max: float = 0.4
    e_min: float = 0.02
    decay: float = 1.0
    bytes_per_hour: float | None = None


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Attributes:
        adapter: name of an adapter.
        options: of the adapter.
        source: clean examples ``(n, *shape)``, preprocessed, for adapters that need some.
        selection: None uploads nothing.
        queue: batches that may wait or be answered at once.
        batch: largest batch.
    """

    adapter: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)
    source: NDArray[np.float32] | None = None
    selection: Selection | None = None
    queue: int = 16
    batch: int = 64


@dataclass(frozen=True)
class Live:
    """The model that answers now, its adapter, and how many swaps led here."""

    model: Model
    adapter: adapters.Adapter
    expected: Expected
    version: int = 1
    affine_version: int = 0


@dataclass(frozen=True)
class Answer:
    """What a batch got: logits and their softmax, ``(n, classes)``, and who answered."""

    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    live: Live


class Runtime:
    """See the module.

    Args:
        model: what is served first.
        settings: how.
        uploads: where selected samples wait.
        folder: keeps the state over restarts; None keeps none. A state of another model or adapter is left aside.
        metrics: counters; made anew where None.

    Raises:
        TrellisError: the adapter does not exist, does not take the model, or lacks clean examples; the model does not
            predict; the settings hold nothing.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings | None = None,
        uploads: UploadBuffer | None = None,
        folder: Path | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.settings = settings = settings or Settings()
        if settings.queue < 1 or settings.batch < 1:
            raise TrellisError("edge-setting", f"queue={settings.queue}, batch={settings.batch}: both are at least 1")
        self.metrics = metrics or Metrics()
        self.turnstile = Turnstile(settings.queue)
        self.uploads = uploads
        self.folder = folder
        chosen = settings.selection or Selection()
        self.thresholds = Thresholds(len(model.predictor.classes), chosen.e_max, chosen.e_min, chosen.decay)
        self.budget = Budget(chosen.bytes_per_hour)
        self._before = time.monotonic()
        self._changed = False
        self._saving = Lock()
        self.live = self._prepared(model)
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what callers sent is theirs
            self._restore(folder / STATE)
        self._show()

    # -- answers --------------------------------------------------------------------------------------

    def predict(self, x: NDArray[np.float32]) -> Answer:
        """Answer a batch ``(n, *shape)``. The caller holds the turn.

        Raises:
            TrellisError: the model or its adapter refuses the batch, or answers with what is not finite.
        """
        live = self.live
        logits = live.adapter.predict(x)
        if not np.isfinite(logits).all():
            live.adapter.reset()
            raise DataError("edge-nonfinite", "the model's answer is not finite; its adaptation was reset")
        log_probabilities = log_softmax(logits)
        probabilities = np.exp(log_probabilities)
        entropies = -(probabilities * log_probabilities).sum(1)
        self.metrics.predicted(entropies)
        if self.uploads is not None and self.settings.selection is not None:
            self._select(self.uploads, x, entropies, live)
        self._changed = True
        return Answer(logits, probabilities, live)

    def _select(self, uploads: UploadBuffer, x: NDArray[np.float32], entropies: NDArray[Any], live: Live) -> None:
        """Queue what the thresholds and the budget leave."""
        now = time.monotonic()
        hours, self._before = (now - self._before) / 3600, now
        preprocessing = live.model.preprocessing
        sample = math.prod(live.expected.shape) * (1 if preprocessing else 4)
        chosen = self.budget.afford(self.thresholds.keep(entropies).nonzero()[0], entropies, sample, hours)
        if not len(chosen):
            return
        images = preprocessing.to_pixels(x[chosen]) if preprocessing else x[chosen]
        try:
            dropped = uploads.add(images, entropies[chosen], f"{live.version}.{live.affine_version}")
        except OSError as error:  # a full disk must not cost answers
            log.error("uploads are not kept: %s", error)
            dropped = len(chosen)
        self.metrics.uploads.labels("selected").inc(len(chosen))
        self.metrics.uploads.labels("dropped").inc(dropped)
        self.metrics.upload_items.set(len(uploads))
        self.metrics.upload_bytes.set(uploads.nbytes)

    # -- swaps ----------------------------------------------------------------------------------------

    def swap_affine(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace scale and shift of the named normalisation layers between two batches. All or nothing.

        Raises:
            TrellisError: the arrays do not fit the model, or with them it predicts what is not finite.
        """
        with self._counted("affine"), self.turnstile.ticket(always=True):
            live = self.live
            before = live.model.predictor.affine()
            live.model.predictor.load_affine(arrays)
            try:
                live.model.check()
            except TrellisError:
                live.model.predictor.load_affine(before)
                raise
            live.adapter.weights_changed()
            self._supply(live.adapter)
            self.live = Live(live.model, live.adapter, live.expected, live.version, live.affine_version + 1)
            self._changed = True
        _refold(live.model)
        self._show()
        log.info("affine parameters were swapped: version %d.%d", self.live.version, self.live.affine_version)

    def swap_model(self, model: Model) -> None:
        """Serve another model from the next batch on. Its adapter starts anew; thresholds and budget go on.

        Raises:
            TrellisError: it takes other inputs, knows other classes, or does not predict. The old one stays.
        """
        with self._counted("model"):
            old = self.live.model.predictor
            for what, was, now in (
                ("shape", old.shape, model.predictor.shape),
                ("classes", old.classes, model.predictor.classes),
            ):
                if was != now:
                    raise DataError(
                        "edge-swap", f"the new model's {what} is {str(now)[:200]}, the served one's {str(was)[:200]}"
                    )
            fresh = self._prepared(model, self.live.version + 1)
            with self.turnstile.ticket(always=True):
                self.live = fresh
                self._changed = True
        self._show()
        log.info("the model was swapped: version %d", fresh.version)

    def _prepared(self, model: Model, version: int = 1) -> Live:
        """Return a model ready to answer."""
        model.check()
        adapter = adapters.create(self.settings.adapter, model.predictor, **self.settings.options)
        self._supply(adapter)
        expected = Expected(model.input_name, model.predictor.shape, model.preprocessing, self.settings.batch)
        return Live(model, adapter, expected, version)

    def _supply(self, adapter: adapters.Adapter) -> None:
        """Show an adapter the clean examples it needs."""
        if not adapter.needs_source:
            return
        if self.settings.source is None:
            raise DataError("edge-source", f"adapter {adapter.name!r} needs clean examples of the source; give some")
        adapter.prepare(self.settings.source)

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        """Count a swap by how it ends."""
        try:
            yield
        except BaseException:
            self.metrics.swaps.labels(what, "refused").inc()
            raise
        self.metrics.swaps.labels(what, "taken").inc()

    # -- state ----------------------------------------------------------------------------------------

    def save(self, seconds: float | None = None) -> bool:
        """Write the state if anything changed since; return whether it was. Batches wait only while it is copied.

        Args:
            seconds: longest to wait for a batch that is being answered; None waits for ever.
        """
        with self._saving:
            if not self._changed:
                return False
            ticket = self.turnstile.ticket(always=True)
            try:
                if not ticket.wait(seconds):
                    log.error("the state is not kept: a batch is still being answered")
                    return False
                self._changed = False
                values, arrays = self._state()
            finally:
                ticket.end()
            self._show()
            if self.folder is None:
                return False
            try:
                state.write(self.folder / STATE, values, arrays)
            except OSError as error:
                self._changed = True
                log.error("the state is not kept: %s", error)
                return False
            return True

    def _state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        live = self.live
        adapter = live.adapter.state()
        kept = {name: value for name, value in adapter.items() if not isinstance(value, np.ndarray)}
        values = {
            "model": live.model.fingerprint,
            "version": live.version,
            "affine_version": live.affine_version,
            "selection": {key: None if value != value else value for key, value in self.thresholds.state().items()},
            "saved": self.budget.saved,
            "adapter": kept,
        }
        arrays = {ADAPTER + name: value for name, value in adapter.items() if isinstance(value, np.ndarray)}
        if live.affine_version:
            arrays |= {AFFINE + name: value for name, value in live.model.predictor.affine().items()}
        return values, arrays

    def _restore(self, path: Path) -> None:
        """Go on from a state; one that cannot be gone on from is set aside, because a device has to answer."""
        try:
            values, arrays = state.read(path)
            if values["model"] != self.live.model.fingerprint:
                raise RunError("edge-state", f"{path} is the state of another model")
            self._load(values, arrays)
        except FileNotFoundError:
            return
        except (TrellisError, KeyError, TypeError, ValueError, AttributeError) as error:
            aside = path.with_suffix(".aside")
            path.replace(aside)
            log.warning("starting without the kept state, now %s: %s", aside, error)
            self.live = self._prepared(self.live.model)

    def _load(self, values: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        live = self.live
        selection = {key: float(math.nan if values["selection"][key] is None else values["selection"][key]) for key in
                     ("total", "e_max")}  # fmt: skip
        seen, saved = int(values["selection"]["seen"]), float(values["saved"])
        version, affine_version = int(values["version"]), int(values["affine_version"])
        before = live.model.predictor.affine()
        affine = {name.removeprefix(AFFINE): v for name, v in arrays.items() if name.startswith(AFFINE)}
        kept = {name.removeprefix(ADAPTER): v for name, v in arrays.items() if name.startswith(ADAPTER)}
        try:
            if affine:
                live.model.predictor.load_affine(affine)
                _refold(live.model)
                live.model.check()
                live.adapter.weights_changed()
            live.adapter.load_state({**values["adapter"], **kept})
            self._supply(live.adapter)
        except Exception:
            live.model.predictor.load_affine(before)
            raise
        self.thresholds.load_state({"seen": seen, **selection})
        self.budget.saved = saved
        self.live = Live(live.model, live.adapter, live.expected, version, affine_version)

    def _show(self) -> None:
        """Bring the metrics that describe the state up to date."""
        live = self.live
        figures = {"mean_entropy": self.thresholds.mean, "e_max": self.thresholds.e_max, **live.adapter.metrics()}
        self.metrics.adapted((key.replace("-", "_"), value) for key, value in figures.items())
        self.metrics.model.info(
            {
                "name": live.model.name,
                "version": str(live.version),
                "affine_version": str(live.affine_version),
                "adapter": live.adapter.name,
                "fingerprint": live.model.fingerprint[:16],
            }
        )


def _refold(model: Model) -> None:
    """Let a predictor that folds its layers fold the new parameters in. Batches go on meanwhile, slower until then."""
    refold = getattr(model.predictor, "refold", None)
    if refold is not None:
        refold()
