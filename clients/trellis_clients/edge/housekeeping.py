"""What a device does between requests: save its state, take in models and affine parameters put into its folders."""

from __future__ import annotations

import logging
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import numpy as np
from numpy.typing import NDArray

from trellis.errors import DataError, TrellisError
from trellis_clients.edge.model import Model
from trellis_clients.edge.runtime import Runtime

log = logging.getLogger("trellis.edge")

LARGEST_AFFINE = 64 << 20
"""Bytes of a file of affine parameters: ViT-H has 1 MB of them."""


class Housekeeper:
    """A thread that looks around now and then.

    A file that changed is taken in whole or refused with a line in the log; what serves goes on either way. Writers
    put a new file beside the old one and rename it, as every atomic replacement works.

    Args:
        runtime: what is kept house for.
        model: the served model's file, watched for a new one; None watches none.
        affine: an ``.npz`` of scale and shift by layer name, watched likewise; it may come later.
        load: reads a model's file.
        every: seconds between looks at the files; 0 never looks.
        save: seconds between saves of a state that changed.
    """

    def __init__(
        self,
        runtime: Runtime,
        model: Path | None,
        affine: Path | None,
        load: Callable[[Path], Model],
        *,
        every: float = 1.0,
        save: float = 5.0,
    ) -> None:
        self.runtime, self.load = runtime, load
        self.every, self.save = every, save
        self._watched: dict[Path, tuple[Callable[[Path], None], object]] = {}
        if every and model is not None:
            self._watched[model] = (self._model, _identity(model))
        if every and affine is not None:
            self._watched[affine] = (self._affine, None)
        self._stop = Event()
        self._thread = Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a swap that is going on is finished first."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Take in what is new."""
        for path, (take, seen) in self._watched.items():
            found = _identity(path)
            if found == seen or found is None:
                continue
            self._watched[path] = (take, found)
            try:
                take(path)
            except TrellisError as error:
                log.error("%s was not taken in: %s", path, error)
            except Exception:  # whatever a file does to a library, the served model goes on
                log.exception("%s was not taken in", path)

    def _run(self) -> None:
        saved = time.monotonic()
        while not self._stop.wait(min(self.every or self.save, self.save)):
            self.look()
            if time.monotonic() - saved >= self.save:
                self.runtime.save()
                saved = time.monotonic()

    def _model(self, path: Path) -> None:
        model = self.load(path)
        if model.fingerprint != self.runtime.live.model.fingerprint:
            self.runtime.swap_model(model)

    def _affine(self, path: Path) -> None:
        self.runtime.swap_affine(read_affine(path))


def read_affine(path: Path) -> dict[str, NDArray[np.float32]]:
    """Return the arrays of an ``.npz`` file by name.

    Raises:
        DataError: it is no such file, is too large, or holds something other than numbers.
    """
    if path.stat().st_size > LARGEST_AFFINE:
        raise DataError("edge-affine", f"{path} has {path.stat().st_size} bytes; at most {LARGEST_AFFINE}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise DataError("edge-affine", f"{path} is no .npz of arrays: {type(error).__name__}: {error}") from None
    for name, values in arrays.items():
        if values.dtype.kind not in "fiu":
            raise DataError("edge-affine", f"{path}: {name!r} is {values.dtype}, not numbers")
    return {name: values.astype(np.float32) for name, values in arrays.items()}


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is replaced; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
