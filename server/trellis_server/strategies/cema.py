"""CEMA: the cloud walks along the edges' streams, adapts a foundation model on what they upload, and distils it.

A round is K batches of every sampled edge. Down go the affine parameters of the edge's copy, up come the samples that
the edge picked. The first message to an edge carries the whole source model beside them.

An edge may be simulated, with labels of its stream for counting right answers, or a device that others ask
(docs/edge.md): then nobody here knows which answers were right, and figures of accuracy are left out.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from pydantic import Field
from torch import Tensor, nn

from trellis import experiment, flower, records, registry, seeding
from trellis.errors import DataError
from trellis.models import adaptation, pretraining
from trellis.registry import register
from trellis.scenario import Component, validated
from trellis_server.cloud_adaptation import CloudAdaptation, Settings
from trellis_server.distillation import Weights
from trellis_server.strategies._build import BuildContext, Sampling, sampling

MESSAGE = "train.stream"
SOURCE = "source"
DEVICE_MODEL = "model"
SOURCE_DIGEST = "source-sha256"
"""Of the source model's weights, with every message: a device that holds a model can see whether it is this one."""
UPLOADS = "uploads"
IMAGES = "images"
SUMMED = ("seen", "right", "uploaded", "upload-bytes", "forwards", "backwards")
RIGHT = "right"
"""Right answers; counted only where the stream has labels, which is in simulation."""
LABELLED = "labelled"
EXPORT = "export"
SHARED = -1
"""Number of the edge copy that all edges share."""


class Config(Sampling):
    """Defaults are the paper's figures at small scale; the official ones for ImageNet stand in the descriptions."""

    foundation: Component = Field(
        Component(name="small-cnn", width=32, norm="batch"),
        description="the large model, like the scenario's key 'model'",
    )
    source_weights: str | None = Field(None, description="safetensors of the edge model; None: trained on clean data")
    foundation_weights: str | None = Field(None, description="safetensors of the foundation model; likewise")
    device_model: str | None = Field(
        None,
        description="ONNX file of the source model for deployed devices that have none; 'export': made from the source "
        "model here",
    )
    epochs: int = Field(30, ge=1, description="of training on clean data")
    lr: float = Field(3e-3, gt=0, description="of Adam on clean data")
    batches: int = Field(1, ge=1, description="K, stream batches per round")
    copies: Literal["shared", "separate"] = Field("shared", description="one edge copy for all edges, or one for each")
    statistics: Literal["uploads", "source"] = Field(
        "uploads", description="what the edge copies normalise by: statistics that follow the uploads, or the source's"
    )
    distil: bool = Field(True, description="False: the edge copy minimises its own entropy, without a teacher")
    e_max: float = Field(0.4, gt=0, description="E_max^0 of the losses' weights, in units of ln C")
    upload_batch: int = Field(16, ge=2, description="uploads per step; 32")
    replay_batch: int = Field(48, ge=0, description="replayed uploads beside them; 96")
    replay_size: int = Field(500, ge=0, description="uploads kept, first in first out; 10000")
    replay_least: int = Field(64, ge=0, description="uploads from which on replay is used; 256")
    edge_lr: float = Field(0.01, gt=0, description="of SGD on the edge copy; 0.0025")
    foundation_lr: float = Field(0.001, gt=0, description="of SGD on the foundation model; 0.00025")
    momentum: float = Field(0.9, ge=0, lt=1)
    entropy_weight: float = Field(3.0, ge=0, description="alpha, the student's entropy")
    kl_weight: float = Field(3.0, ge=0, description="beta, KL divergence from the teacher")
    ce_weight: float = Field(1.0, ge=0, description="gamma, cross-entropy to the teacher's labels")
    temperature: float = Field(1.0, gt=0)
    max_grad_norm: float | None = Field(None, gt=0, description="clip; weights reach C^e_max")


class Cema(FedAvg):
    """The cloud's side of CEMA as a Flower strategy. It merges uploads, not weights; nothing is averaged.

    Before ``attach`` it has no models and only passes on the arrays it is given.

    Args:
        config: see there.
        seed: of this cell.
        folder: where relative file names start from.
        **sampling: as of ``FedAvg``.
    """

    def __init__(self, config: Config, seed: int, folder: Path, **sampling: Any) -> None:
        super().__init__(**sampling)
        self.config, self.seed, self.folder = config, seed, folder
        self.cloud: CloudAdaptation | None = None
        self.source: ArrayRecord | None = None
        self.source_digest: str | None = None
        self.device_model: ArrayRecord | None = None
        self.asked: set[int] = set()
        self.deployed: set[int] = set()
        self.refusals: Counter[int] = Counter()
        self.totals: Counter[str] = Counter()
        self.foundation_start: dict[str, np.ndarray[Any, Any]] | None = None
        self.resumed: dict[str, Any] | None = None

    # -- start ----------------------------------------------------------------------------------------

    def attach(self, bench: Any) -> ArrayRecord:
        """Make both models, trained or read, or as the checkpoint has them. Returns the arrays to start from.

        Args:
            bench: the cloud's use of the trainer; its ``site`` has trainer, data and device.

        Raises:
            DataError: a weights file is missing or does not fit; the edge model has no normalisation layers.
            PluginError: no model has the foundation model's name; there is nothing here to export a model with.
        """
        c, self.site = self.config, bench.site
        data, device = self.site.federation.data, self.site.device
        with seeding.scoped(self.seed, "cema", "edge"):
            edge = self.site.trainer.build().to(device)
        self._start(edge, c.source_weights, "source", self.resumed and self.resumed["source"])
        self.names = list(self.site.trainer.shared(edge))
        self.source, self.source_digest = _record(edge.state_dict()), adaptation.weights_digest(edge)
        self.device_model = self._device_model(edge)
        self.site.trainer.source = {name: values.clone() for name, values in edge.state_dict().items()}
        settings = Settings(
            e_max=c.e_max * math.log(data.num_classes),
            upload_batch=c.upload_batch,
            replay_batch=c.replay_batch,
            replay_size=c.replay_size,
            replay_least=c.replay_least,
            foundation_lr=c.foundation_lr,
            edge_lr=c.edge_lr,
            momentum=c.momentum,
            weights=Weights(c.entropy_weight, c.kl_weight, c.ce_weight),
            temperature=c.temperature,
            distil=c.distil,
            follow=c.statistics == "uploads",
            max_grad_norm=c.max_grad_norm,
        )
        self.cloud = CloudAdaptation(self._foundation, edge, settings, self.seed, device)
        if self.resumed is not None:
            self.cloud.load_state(self.resumed["cloud"])
            self.resumed = None
        return self._arrays()

    def _foundation(self) -> nn.Module:
        c, data = self.config, self.site.federation.data
        cls = registry.load("models", c.foundation.name, base=self.folder)
        config = validated(cls.Config, c.foundation.params)  # type: ignore[attr-defined]
        with seeding.scoped(self.seed, "cema", "foundation"):
            model: nn.Module = cls(config).build(data.example_shape, data.num_classes, data.facts).to(self.site.device)
        self._start(model, c.foundation_weights, "foundation", self.foundation_start)
        if c.foundation_weights is None:
            self.foundation_start = _plain(model.state_dict())
        return model

    def _device_model(self, edge: nn.Module) -> ArrayRecord | None:
        """Return the source model's ONNX file: the one named, the checkpoint's, or a fresh export."""
        named, kept = self.config.device_model, (self.resumed or {}).get("device_model")
        if named is None:
            return None
        if named == EXPORT and kept is not None:
            return records.array_record({"onnx": kept})
        data = self.site.federation.data
        with tempfile.TemporaryDirectory(prefix="trellis-export-") as folder:
            path = self.folder / named
            if named == EXPORT:
                path = Path(folder, "model.onnx")
                examples = data.train.batch(torch.arange(min(len(data.train), 64), device=data.train.rows.device))
                preprocessing = {key: list(data.facts.get(key, (d,))) for key, d in (("mean", 0.0), ("std", 1.0))}
                experiment.app_module("export").export_model(
                    edge, path, classes=data.classes, shape=data.example_shape, calibration=examples.x.cpu().numpy(),
                    precision="none", preprocessing=preprocessing,
                )  # fmt: skip
            if not path.is_file():
                raise DataError("weights-missing", f"strategy.device_model: nothing is at {path}")
            return records.array_record({"onnx": np.frombuffer(path.read_bytes(), np.uint8)})

    def _start(self, model: nn.Module, weights: str | None, name: str, kept: Mapping[str, Any] | None) -> None:
        """Give a model its clean weights: a file's, the checkpoint's, or by training on all edges' clean examples."""
        c, site = self.config, self.site
        if weights is not None:
            pretraining.read(model, self.folder / weights, f"strategy.{name}_weights")
        elif kept is not None:
            model.load_state_dict({key: torch.from_numpy(values) for key, values in kept.items()})
            model.eval()
        else:
            rows = torch.from_numpy(np.concatenate([np.asarray(part) for part in site.federation.parts]))
            clean = site.federation.data.train.subset(rows.to(site.device))
            pretraining.train(model, clean, epochs=c.epochs, lr=c.lr, batch_size=32, seed=self.seed, name=name)

    # -- a round --------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every sampled edge its copy's affine parameters, and the source model if it has none yet."""
        config["batches"] = self.config.batches
        if self.source_digest is not None:
            config[SOURCE_DIGEST] = self.source_digest
        messages = []
        for message in super().configure_train(server_round, arrays, config, grid):
            node = message.metadata.dst_node_id
            own = arrays if self.cloud is None or self.config.copies == "shared" else self._arrays(node)
            content = RecordDict({records.ARRAYS: own, records.CONFIG: config})
            if self.source is not None and node not in self.deployed:
                content[SOURCE] = self.source
                if self.device_model is not None:
                    content[DEVICE_MODEL] = self.device_model
            messages.append(Message(content, node, MESSAGE))
        self.asked = {message.metadata.dst_node_id for message in messages}
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nothing: an edge is judged by the answers it gives along its stream."""
        del server_round, arrays, config, grid
        return []

    def expected_reply(self, message: Message) -> Mapping[str, Mapping[str, tuple[tuple[int | None, ...], str]]] | None:
        """Return what the gate admits: any number of images of the data set's shape."""
        if message.metadata.message_type != MESSAGE or self.cloud is None:
            return None
        trainer = self.site.trainer
        return {UPLOADS: {IMAGES: ((None, *trainer.task.shape), trainer.config.upload)}}

    def problem_with(self, message: Message, reply: Message) -> str | None:
        """Return what the gate cannot know is wrong: more uploads than were streamed, counts or values out of range."""
        if message.metadata.message_type != MESSAGE or self.cloud is None:
            return None
        problem = self._problem(reply.content)
        if problem is not None:
            self.refusals[flower.client_of(message.metadata.dst_node_id)] += 1
        return problem

    def _problem(self, content: RecordDict) -> str | None:
        images = records.view(records.array_records(content)[UPLOADS][IMAGES])
        metrics: Mapping[str, Any] = next(iter(records.metric_records(content).values()))
        streamed = self.config.batches * self.site.trainer.config.stream.batch_size
        if len(images) > streamed:
            return f"upload: {len(images)} images; the stream had {streamed}"
        for name in SUMMED:
            value = metrics.get(name)
            if name == RIGHT and value is None:
                continue
            if not isinstance(value, int | float) or value < 0:
                return f"upload: metric {name!r} is {value!r}, not a count"
        # A device answers as many as it is asked, and may upload what it answered before its last report.
        fits = RIGHT not in metrics or (metrics["seen"] == streamed and metrics[RIGHT] <= metrics["seen"])
        if not fits or metrics["uploaded"] != len(images):
            return f"upload: counts do not agree with {streamed} streamed and {len(images)} uploaded"
        if images.dtype.kind == "f" and images.size:
            low, high = float(images.min()), float(images.max())
            if low < 0 or high > 1:
                return f"upload: pixels from {low:.6g} to {high:.6g}; allowed is 0 to 1"
        return None

    def aggregate_train(
        self,
        server_round: int,  # noqa: ARG002
        replies: Iterable[Message],
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Adapt on the round's uploads, in the order of the replies."""
        good = [reply for reply in replies if not reply.has_error()]
        assert self.cloud is not None, "attach() comes before the first round"
        uploads: dict[int, list[Tensor]] = {}
        counts: Counter[str] = Counter()
        means: dict[str, list[float]] = {}
        for reply in good:
            node = reply.metadata.src_node_id
            self.deployed.add(node)
            images = records.view(records.array_records(reply.content)[UPLOADS][IMAGES])
            number = SHARED if self.config.copies == "shared" else node
            uploads.setdefault(number, []).append(self._inputs(images))
            metrics: Mapping[str, Any] = next(iter(records.metric_records(reply.content).values()))
            counts[LABELLED] += int(metrics["seen"]) if RIGHT in metrics else 0
            for name, value in metrics.items():
                if name in SUMMED:
                    counts[name] += int(value)
                elif name in ("entropy", "e-max"):
                    means.setdefault(name, []).append(float(value))
        # Whoever failed may have lost what it kept, the source model included: it is sent again.
        self.deployed -= self.asked - {reply.metadata.src_node_id for reply in good}
        if not good:
            return None, None
        self.totals.update(counts)
        report = self.cloud.adapt({number: torch.cat(images) for number, images in uploads.items()})
        steps = max(report.steps, 1)
        accuracies = {
            "accuracy": self.totals[RIGHT] / max(self.totals[LABELLED], 1),  # online: all answers so far
            "round-accuracy": counts[RIGHT] / max(counts[LABELLED], 1),
        }
        labelled = bool(counts[LABELLED])
        return self._arrays(), MetricRecord(
            {
                **(accuracies if labelled else {}),
                "upload-share": self.totals["uploaded"] / max(self.totals["seen"], 1),
                **{name: counts[name] for name in SUMMED if name != RIGHT or labelled},
                **{name: float(np.mean(values)) for name, values in means.items()},
                "cloud-steps": report.steps,
                "cloud-samples": report.samples,
                "loss": report.edge_loss / steps,
                "foundation-loss": report.foundation_loss / steps,
                "replay": len(self.cloud.replay),
                "refused-uploads": sum(self.refusals.values()),
            }
        )

    def _inputs(self, images: np.ndarray[Any, Any]) -> Tensor:
        """Return uploaded pixels as the models' inputs."""
        pixels = torch.from_numpy(np.array(images)).to(self.site.device)
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        facts = self.site.federation.data.facts
        mean, std = (torch.tensor(facts.get(k, (d,)), device=pixels.device) for k, d in (("mean", 0.0), ("std", 1.0)))
        return (pixels - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)

    def _arrays(self, node: int | None = None) -> ArrayRecord:
        """Return what an edge is sent. Of separate copies, without a node, their mean: it stands for the run."""
        assert self.cloud is not None
        if node is not None or self.config.copies == "shared":
            state = self.cloud.copy(SHARED if node is None else node).model.state_dict()
            return _record({name: state[name] for name in self.names})
        copies = [self.cloud.copies[n].model.state_dict() for n in sorted(self.cloud.copies)]
        copies = copies or [self.cloud.source.state_dict()]
        return _record({name: torch.stack([state[name] for state in copies]).mean(0) for name in self.names})

    # -- what is kept ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything the next round depends on. Frozen weights are in it unless they are a file's."""
        if self.cloud is None:
            return {}
        assert self.source is not None
        return {
            "cloud": self.cloud.state(),
            "source": None if self.config.source_weights is not None else _views(self.source),
            "foundation": self.foundation_start,
            "device_model": None if self.device_model is None else records.view(self.device_model["onnx"]),
            "deployed": sorted(self.deployed),
            "refusals": dict(self.refusals),
            "totals": dict(self.totals),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a state; the models are made from it in ``attach``."""
        if not state:
            return
        self.resumed = state
        self.foundation_start = state["foundation"]
        self.deployed = set(state["deployed"])
        self.refusals, self.totals = Counter(state["refusals"]), Counter(state["totals"])


def _plain(state: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: values.detach().cpu().numpy().copy() for name, values in state.items()}


def _views(record: ArrayRecord) -> dict[str, np.ndarray[Any, Any]]:
    return {name: records.view(array) for name, array in record.items()}


def _record(state: Mapping[str, Tensor]) -> ArrayRecord:
    return records.array_record(_plain(state))


@register(
    "strategies",
    "cema",
    summary="CEMA: adapts a foundation model on edges' uploads and distils it into their affine parameters",
    paper="https://arxiv.org/abs/2402.17316",
    merges="uploads",
)
class CemaPlugin:
    """Cloud-edge elastic model adaptation, for the trainer ``cema`` and the baselines of its family."""

    class Config(Config):
        """See above."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def build(self, context: BuildContext) -> Cema:
        return Cema(self.config, context.seed, context.folder, **sampling(self.config, context))
