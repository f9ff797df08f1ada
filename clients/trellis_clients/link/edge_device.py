"""A device that serves a model for others and keeps account of it for the cloud: what it answered, what it uploads.

What it keeps lies in its store, beside the answers that it gave:

    <folder>/device.json                      which cell it serves, so that it serves at once when it is started again
    <folder>/<run>/<cell>/device/setup.json   what the server said of the cell
    <folder>/<run>/<cell>/device/model.onnx   the model, where it came over the link
    <folder>/<run>/<cell>/device/state.npz    adapter, thresholds, received parameters; see docs/edge.md
    <folder>/<run>/<cell>/device/uploads/     samples that wait for the cloud
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter

from trellis.errors import DataError
from trellis.wire.content import Content, Record
from trellis_clients.edge import loading
from trellis_clients.edge.housekeeping import Housekeeper
from trellis_clients.edge.metrics import Metrics
from trellis_clients.edge.model import Model
from trellis_clients.edge.runtime import Runtime, Settings
from trellis_clients.edge.server import Address, EdgeServer
from trellis_clients.edge.uploads import Upload, UploadBuffer
from trellis_clients.link.edge_duty import CEMA, Duty
from trellis_clients.link.store import Store

SAVE_S = 5.0


@dataclass(frozen=True)
class Serving:
    """How a device serves, beyond what the scenario says.

    Attributes:
        address: where outside clients ask.
        metrics: where Prometheus asks; None for none.
        name: under which clients ask for the model.
        threads: of ONNX Runtime.
        batch: largest batch of a request.
        queue: batches that may wait.
        upload_bytes: most that waits for the cloud.
    """

    address: str = "127.0.0.1:8001"
    metrics: str | None = None
    name: str = "model"
    threads: int = 1
    batch: int = 64
    queue: int = 16
    upload_bytes: int = 64_000_000


@dataclass(frozen=True)
class Account:
    """Up to where the cloud knows what this device did.

    Attributes:
        seen: examples answered, since the first start.
        total: sum of their entropies, in nats.
        numbers: of the samples that went with the last answer.
    """

    seen: int = 0
    total: float = 0.0
    numbers: list[int] = field(default_factory=list)


class Device:
    """A served model in its place in a scenario. ``start``, then ``stop``.

    Args:
        duty: what the scenario asks.
        store: of its cell.
        model: the file.
        serving: see there.

    Attributes:
        model: the file.
        weights: digest of the weights that it was made from; None where the file does not say.

    Raises:
        TrellisError: the model is refused, or does not suit the duty.
    """

    def __init__(self, duty: Duty, store: Store, model: Path, serving: Serving) -> None:
        self.duty, self.store, self.model = duty, store, model
        folder = store.folder / "device"
        loaded = self._load(model, serving)
        if loaded.preprocessing is None:
            raise DataError(
                "edge-preprocessing", f"{model} does not say how pixels become its inputs, so none can be uploaded"
            )
        self.weights = loaded.weights
        adapter, options = duty.adapter(loaded.predictor)
        settings = Settings(
            adapter=adapter, options=options, selection=duty.selection, queue=serving.queue, batch=serving.batch
        )
        # Room for one report under way and the next: on a busy device what goes up is what it saw last.
        items = 2 * duty.batches * duty.batch_size
        self.uploads = UploadBuffer(items, serving.upload_bytes, folder=folder / "uploads")
        metrics = Metrics()
        self.tasks = Counter(
            "trellis_edge_tasks", "Tasks of the link, by how they ended", ["verdict"], registry=metrics.registry
        )
        self.runtime = Runtime(loaded, settings, self.uploads, folder, metrics)
        keeper = Housekeeper(self.runtime, None, None, lambda path: self._load(path, serving), every=0.0, save=SAVE_S)
        self.server = EdgeServer(self.runtime, Address(serving.address, serving.metrics), keeper)
        known = store.state()
        self.known = Account() if known is None else account_of(known)
        self.uploads.sent(self.known.numbers)  # in case it was killed between the cloud's word and this one

    @staticmethod
    def _load(model: Path, serving: Serving) -> Model:
        return loading.load(model, serving.name, serving.threads)

    def start(self) -> dict[str, Any]:
        """Listen, and return what a person or a script wants to know of it.

        Raises:
            GridError: an address is taken.
        """
        self.server.start()
        live = self.runtime.live
        return {
            "serving": live.model.name,
            "address": self.server.where,
            "metrics": self.server.metrics_where,
            "adapter": live.adapter.name,
            "version": live.version,
            "affine_version": live.affine_version,
            "cell": self.duty.cell,
        }

    def stop(self, grace: float = 10.0) -> None:
        """Let what is being answered end, and save."""
        self.server.stop(grace)

    # -- the cloud's tasks ------------------------------------------------------------------------------

    def take_in(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Serve with these scales and shifts from the next batch on. Where they are served already nothing happens.

        Raises:
            TrellisError: they are not those of this model's normalisation layers.
        """
        current = self.runtime.live.model.predictor.affine()
        if missing := sorted(current.keys() - arrays.keys()):
            raise DataError(
                "affine-missing",
                f"the cloud sent no {missing[0]!r}, which this device's model has: it serves another model than the"
                " scenario's",
            )
        if arrays.keys() == current.keys() and all(np.array_equal(arrays[name], current[name]) for name in current):
            return
        self.runtime.swap_affine(arrays)

    @property
    def answered(self) -> int:
        """Examples answered that the cloud does not know of."""
        return self.runtime.thresholds.seen - self._base().seen

    def _base(self) -> Account:
        """Return the account to go on from. A device whose state was lost has begun to count anew."""
        return self.known if self.known.seen <= self.runtime.thresholds.seen else Account()

    def report(self, most: int) -> tuple[Content, Account]:
        """Return the answer to a task, and the account that holds once the cloud has it.

        Args:
            most: samples that may go along; the others wait for the next task.
        """
        runtime = self.runtime
        with runtime.turnstile.ticket(always=True):  # between two batches, so that counts and samples agree
            chosen = self.uploads.take(most)
            base, thresholds = self._base(), runtime.thresholds
            now = Account(thresholds.seen, thresholds.total, [each.number for each in chosen])
            e_max, affine_version = thresholds.e_max, runtime.live.affine_version
        runtime.save()
        seen, images = now.seen - base.seen, self._images(chosen)
        metrics: dict[str, Any] = {
            "num-examples": min(seen, self.duty.most_examples),  # a weight, which nothing here is weighted by
            "seen": seen,
            "entropy": (now.total - base.total) / seen,
            "uploaded": len(images),
            "upload-bytes": images.nbytes,
            "forwards": seen,
            "backwards": 0,
            "waiting": len(self.uploads) - len(images),
            "affine-version": affine_version,
        }
        if self.duty.trainer == CEMA:
            metrics["e-max"] = min(e_max, math.log(len(runtime.live.model.predictor.classes)))
        return {"uploads": Record("arrays", {"images": images}), "metrics": Record("metrics", metrics)}, now

    def _images(self, chosen: list[Upload]) -> NDArray[Any]:
        shape = self.runtime.live.expected.shape
        pixels = np.stack([each.image for each in chosen]) if chosen else np.empty((0, *shape), np.uint8)
        if self.duty.options.get("upload", "uint8") == "float32":
            return pixels.astype(np.float32) / np.float32(255)
        return pixels

    def delivered(self, account: Account) -> None:
        """The cloud has an answer: what went with it is forgotten."""
        self.known = account
        self.uploads.sent(account.numbers)
        metrics = self.runtime.metrics
        metrics.uploads.labels("sent").inc(len(account.numbers))
        metrics.upload_items.set(len(self.uploads))
        metrics.upload_bytes.set(self.uploads.nbytes)

    def kept_back(self, account: Account) -> None:
        """The cloud does not want an answer: what went with it waits again."""
        self.uploads.back(account.numbers)


def packed(account: Account) -> bytes:
    """Return an account as the store keeps it."""
    return json.dumps(asdict(account)).encode()


def account_of(kept: bytes) -> Account:
    """Return what ``packed`` wrote."""
    values = json.loads(kept)
    return Account(int(values["seen"]), float(values["total"]), [int(number) for number in values["numbers"]])
