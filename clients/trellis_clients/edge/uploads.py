"""Samples that wait for the cloud, in bounded room.

Drop policy: where a sample does not fit, the oldest that waits is dropped, because the stream has drifted since, and
the cloud's replay buffer keeps the newest as well. With ``drop="newest"`` the one that comes is dropped instead.
What was lent to a sender (``take``) is dropped too if its turn comes; ``sent`` and ``back`` then pass it over.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trellis.errors import RunError, TrellisError
from trellis_clients.edge import state

NEXT = "next"
RESERVE = 10_000


@dataclass(frozen=True)
class Upload:
    """One sample on its way to the cloud.

    Attributes:
        number: counts up over the life of the buffer, restarts included if it is in a folder. A sample that is sent
            again keeps it, so that the cloud can count it once.
        image: one example: pixels as uint8, or the model's inputs as float32.
        entropy: of the prediction, in nats.
        model: version of the model that predicted.
    """

    number: int
    image: NDArray[Any]
    entropy: float
    model: str

    @property
    def nbytes(self) -> int:
        """Bytes of the image, which is what the bounds count."""
        return self.image.nbytes


class UploadBuffer:
    """A queue of uploads with two bounds, in memory or in a folder with one file a sample. Safe to use from threads.

    Args:
        items: most samples that wait.
        size: most bytes of their images.
        drop: who goes when there is no room.
        folder: where they are kept; None keeps them in memory. A sample's file is whole or not there under its name;
            it outlives a killed process, but is not forced to the disk, so a loss of power may take the last ones.

    Raises:
        TrellisError: bounds that hold nothing.
    """

    def __init__(
        self, items: int, size: int, drop: Literal["oldest", "newest"] = "oldest", folder: Path | None = None
    ) -> None:
        if items < 1 or size < 1:
            raise TrellisError("edge-uploads", f"an upload buffer of {items} items and {size} bytes holds nothing")
        self.items, self.size, self.drop, self.folder = items, size, drop, folder
        self.added = self.dropped = self.done = 0
        self.nbytes = 0
        self._next = self._reserved = 0
        self._sizes: dict[int, int] = {}  # by number, oldest first
        self._kept: dict[int, Upload] = {}  # only without a folder
        self._lent: set[int] = set()
        self._lock = Lock()
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # pictures of the user
            self._restore(folder)

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, images: NDArray[Any], entropies: NDArray[Any], model: str) -> int:
        """Queue samples; return how many were dropped to make room, or for want of it.

        Args:
            images: ``(n, *shape)``.
            entropies: ``(n,)``, nats.
            model: version of the model that predicted.
        """
        with self._lock:
            before = self.dropped
            for image, entropy in zip(images, entropies, strict=True):
                self._add(Upload(self._next, image.copy(), float(entropy), model))
            return self.dropped - before

    def take(self, items: int) -> list[Upload]:
        """Lend the oldest samples that are not lent yet. They stay in the buffer until ``sent``."""
        with self._lock:
            numbers = [number for number in self._sizes if number not in self._lent][:items]
            taken = []
            for number in numbers:
                try:
                    taken.append(self._kept[number] if self.folder is None else self._read(number))
                except (TrellisError, FileNotFoundError):  # a file that a loss of power cut off
                    self._remove(number)
                    self.dropped += 1
                else:
                    self._lent.add(number)
            return taken

    def sent(self, numbers: Sequence[int]) -> None:
        """The cloud has these: forget them."""
        with self._lock:
            for number in numbers:
                if number in self._sizes:
                    self._remove(number)
                    self.done += 1

    def back(self, numbers: Sequence[int]) -> None:
        """These did not arrive: they wait again, in their old places."""
        with self._lock:
            self._lent.difference_update(numbers)

    def _add(self, upload: Upload) -> None:
        self._next += 1
        if self.folder is not None and self._next > self._reserved:
            self._reserve(self.folder)
        self.added += 1
        full = len(self) >= self.items or self.nbytes + upload.nbytes > self.size
        if upload.nbytes > self.size or (full and self.drop == "newest"):
            self.dropped += 1
            return
        while len(self) >= self.items or self.nbytes + upload.nbytes > self.size:
            self._remove(next(iter(self._sizes)))
            self.dropped += 1
        if self.folder is None:
            self._kept[upload.number] = upload
        else:
            self._write(upload)
        self._sizes[upload.number] = upload.nbytes
        self.nbytes += upload.nbytes

    def _remove(self, number: int) -> None:
        self.nbytes -= self._sizes.pop(number)
        self._kept.pop(number, None)
        self._lent.discard(number)
        if self.folder is not None:
            self._path(number).unlink(missing_ok=True)

    def _reserve(self, folder: Path) -> None:
        """Note on disk which numbers may have been given out, many at a time."""
        self._reserved = self._next + RESERVE
        state.replace(folder / NEXT, str(self._reserved).encode())

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:012d}.npz"

    def _write(self, upload: Upload) -> None:
        path = self._path(upload.number)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(state.packed({"entropy": upload.entropy, "model": upload.model}, {"image": upload.image}))
        temporary.replace(path)

    def _read(self, number: int) -> Upload:
        values, arrays = state.read(self._path(number))
        try:
            return Upload(number, arrays["image"], float(values["entropy"]), str(values["model"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RunError("edge-state", f"{self._path(number)} is no upload: {error!r}") from None

    def _restore(self, folder: Path) -> None:
        """Take up what an earlier process left: whole files, newest within the bounds."""
        for path in folder.glob("*.tmp"):
            path.unlink(missing_ok=True)
        for path in sorted(folder.glob("*.npz")):
            if not path.stem.isdecimal():
                continue
            number = int(path.stem)
            self._next = max(self._next, number + 1)
            try:
                size = _image_bytes(path)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                path.unlink(missing_ok=True)
                self.dropped += 1
                continue
            self._sizes[number] = size
            self.nbytes += size
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._next = max(self._next, int((folder / NEXT).read_text()))
        while self._sizes and (len(self) > self.items or self.nbytes > self.size):
            self._remove(next(iter(self._sizes)))
            self.dropped += 1


def _image_bytes(path: Path) -> int:
    """Return the bytes of a file's image without reading it."""
    with zipfile.ZipFile(path) as archive, archive.open("image.npy") as member:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    return int(np.prod(shape)) * dtype.itemsize
