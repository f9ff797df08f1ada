"""CCVR: after the last round, retrain the head on features drawn from one Gaussian per class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from pydantic import Field

from trellis import flower, records, seeding
from trellis.errors import RoundError, ScenarioError
from trellis.grids.base import StreamGrid
from trellis.registry import register
from trellis.scenario import Component, Strict
from trellis_server import moments
from trellis_server.gaussian_mechanism import epsilon
from trellis_server.head import Head, Site, Training, accuracy_by_class, retrain
from trellis_server.strategies._build import Base, BuildContext, build_base

QUESTION = "query.moments"


class Noise(Strict):
    """The Gaussian mechanism on each client's statistics, before they leave it."""

    clip_norm: float = Field(gt=0, description="features are scaled down to this L2 norm before they are counted in")
    multiplier: float = Field(gt=0, description="deviation of the noise over the sensitivity to one example")
    delta: float = Field(1e-5, gt=0, lt=1, description="the delta at which epsilon is stated")
    seeded: bool = Field(
        True, description="noise from the run's seed, which who knows the seed can subtract; false: from the system"
    )


class CcvrConfig(Strict):
    """How the head is calibrated; the defaults suit features of tens to hundreds of dimensions."""

    base: Base = Field(Component(name="fedavg"), description="the strategy that trains")
    virtual_per_class: int = Field(200, ge=1, description="M_c: virtual features drawn of each class")
    allocation: Literal["constant", "proportional"] = Field(
        "constant", description="proportional deals the same sum in proportion to the classes' examples"
    )
    epochs: int = Field(50, ge=0, description="passes over the virtual features")
    lr: float = Field(0.01, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(64, ge=1)
    clients: int | None = Field(None, ge=1, description="how many clients are asked, drawn at random; null: all")
    min_clients: int = Field(1, ge=1, description="usable answers below which the run stops")
    min_count: int = Field(1, ge=1, description="a client is silent on classes of which it has fewer examples")
    upload: Literal["packed", "full", "low-rank"] = Field("packed", description="how covariances travel")
    rank: int = Field(16, ge=1, description="eigenpairs of a low-rank upload")
    precision: Literal["float32", "float64"] = Field("float32", description="of the upload; pooling is in float64")
    shrinkage: float = Field(0.0, ge=0, description="examples' worth of the covariance within all classes")
    ridge: float = Field(1e-6, ge=0, description="share of the mean variance added in every direction")
    noise: Noise | None = Field(None, description="differential privacy of the statistics")


class Ccvr(Strategy):
    """Classifier calibration with virtual representations, around any strategy (Luo et al. 2021, section 4.2).

    Rounds are the inner strategy's. ``finish`` asks clients for the moments of the final model's features by class,
    pools them exactly, draws virtual features from one Gaussian per class, and trains the head on these by
    cross-entropy. No other array of the model changes by a bit.

    Classes that nobody reports keep their row of the head and take no part in the calibration's softmax.

    Args:
        inner: the strategy that trains.
        config: how to calibrate.
        seed: of the sampling.

    Attributes:
        refused: client and reason of answers that could not be pooled, until the loop has written them down.
    """

    def __init__(self, inner: Strategy, config: CcvrConfig, seed: int) -> None:
        self.inner = inner
        self.config = config
        self.seed = seed
        self.refused: dict[int, str] = {}
        # A function, because attributes that hold data are the strategy's state in a checkpoint.
        self._head: Callable[[], Head] = _unattached

    # -- the rounds are the inner strategy's ----------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return self.inner.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self.inner.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self.inner.summary()

    # -- what the loop offers beyond Flower's ---------------------------------------------------------

    def attach(self, bench: Any) -> ArrayRecord | None:
        """Take the cloud's use of the trainer, ``bench.site``.

        Returns:
            The arrays that the inner strategy wants to start from, if it wants any.

        Raises:
            ScenarioError: the model has no head to calibrate, or clients keep parts of the extractor.
        """
        site: Site = bench.site
        head = Head.of(site, "ccvr")
        self._head = lambda: head
        start_from: ArrayRecord | None = self.inner.attach(bench) if hasattr(self.inner, "attach") else None
        return start_from

    def expected_reply(self, message: Message) -> Any:
        """Return the arrays that an answer must hold, for the admission gate."""
        if message.metadata.message_type == QUESTION:
            return {moments.RECORD: self._layout().arrays()}
        expected: Callable[[Message], Any] | None = getattr(self.inner, "expected_reply", None)
        return expected(message) if expected else None

    def finish(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: StreamGrid, timeout: float
    ) -> tuple[ArrayRecord, MetricRecord | None]:
        """Calibrate the head.

        Returns:
            The model with its new head, and what the calibration did and cost.

        Raises:
            RoundError: fewer usable answers than ``min_clients``.
        """
        metrics: dict[str, Any] = {}
        if hasattr(self.inner, "finish"):
            arrays, found = self.inner.finish(number, arrays, config, grid, timeout)
            metrics |= dict(found or {})
        pool, exchange = self._asked(number, arrays, config, grid, timeout)
        head = self._head()
        before = head.parameters(arrays)
        after = self._calibrated(pool, before) if pool.classes else before
        metrics |= {**exchange, **self._spent(), "classes": pool.classes}
        for when, parameters in (("before", before), ("after", after)):
            metrics[f"weight-norms-{when}"] = parameters[0].norm(dim=1).tolist()
        metrics |= self._tested(arrays, before, after)
        return head.replaced(arrays, after), MetricRecord(metrics)

    # -- the steps of the calibration -----------------------------------------------------------------

    def _asked(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: StreamGrid, timeout: float
    ) -> tuple[moments.Pool, dict[str, Any]]:
        """Ask clients for their moments and pool the answers one by one, as they come."""
        layout = self._layout()
        pool = moments.Pool(layout.features)
        content = RecordDict({records.ARRAYS: arrays, records.CONFIG: self._question(number, config)})
        messages = [Message(content, node, QUESTION) for node in self._cohort(grid)]
        used: list[int] = []
        failed: dict[int, str] = {}
        up = 0
        for reply in grid.stream(messages, timeout=timeout):
            client = flower.client_of(reply.metadata.src_node_id)
            if reply.has_error():
                failed[client] = reply.error.reason or f"error {reply.error.code}"
                continue
            up += records.content_bytes(reply.content)
            try:
                answer = moments.read(records.array_records(reply.content).get(moments.RECORD), layout)
            except moments.RefusedError as error:
                self.refused[client] = str(error)
            else:
                pool.add(answer)
                used.append(client)
                del answer
            del reply  # or it would be held while the next one is made
        if len(used) < self.config.min_clients:
            reasons = "; ".join(f"client {k}: {why}" for k, why in list((failed | self.refused).items())[:5])
            raise RoundError(
                "quorum-missed",
                f"calibration: {len(used)} of {len(messages)} clients gave usable moments, "
                f"{self.config.min_clients} were needed (strategy.min_clients). {reasons}",
            )
        return pool, {
            "clients-asked": len(messages),
            "clients-used": sorted(used),
            "clients-refused": sorted(self.refused),
            "clients-failed": sorted(failed),
            "bytes-down": records.content_bytes(content) * len(messages),
            "bytes-up": up,
        }

    def _layout(self) -> moments.Layout:
        head, config = self._head(), self.config
        return moments.Layout(head.classes, head.features, config.upload, config.rank, config.precision)

    def _question(self, number: int, config: ConfigRecord) -> ConfigRecord:
        ours, noise = self.config, self.config.noise
        wish: dict[str, Any] = {
            **config,
            "server-round": number,
            "upload": ours.upload,
            "rank": ours.rank,
            "precision": ours.precision,
            "min-count": ours.min_count,
        }
        if noise is not None:
            wish |= {"noise-multiplier": noise.multiplier, "clip-norm": noise.clip_norm, "seeded-noise": noise.seeded}
        return ConfigRecord(wish)

    def _cohort(self, grid: Grid) -> list[int]:
        nodes = sorted(grid.get_node_ids())
        if self.config.clients is None or self.config.clients >= len(nodes):
            return nodes
        chosen = seeding.numpy_generator(self.seed, "ccvr", "cohort").permutation(len(nodes))[: self.config.clients]
        return [nodes[i] for i in sorted(chosen)]

    def _calibrated(self, pool: moments.Pool, parameters: list[Any]) -> list[Any]:
        ours = self.config
        features, labels = moments.virtual_features(
            pool,
            moments.amounts(pool, ours.virtual_per_class, pool.classes, proportional=ours.allocation == "proportional"),
            seeding.numpy_generator(self.seed, "ccvr", "virtual"),
            shrinkage=ours.shrinkage,
            ridge=ours.ridge,
        )
        training = Training(ours.epochs, ours.lr, ours.momentum, ours.batch_size, ours.weight_decay)
        return retrain(parameters, features, labels, training, seeding.torch_generator(self.seed, "ccvr", "order"))

    def _spent(self) -> dict[str, float]:
        """Return what this exchange cost each client's examples in privacy; nothing where there was no noise."""
        noise = self.config.noise
        if noise is None:
            return {}
        return {"epsilon": epsilon(noise.multiplier, noise.delta), "delta": noise.delta}

    def _tested(self, arrays: ArrayRecord, before: list[Any], after: list[Any]) -> dict[str, Any]:
        """Return accuracies of both heads on the held-out set, if there is one."""
        head = self._head()
        split = head.site.federation.data.test
        if not len(split):
            return {}
        features, labels = head.features_of(arrays, split)
        found: dict[str, Any] = {}
        for when, parameters in (("before", before), ("after", after)):
            total, by_class = accuracy_by_class(parameters, features, labels)
            found[f"accuracy-{when}"] = total
            found[f"class-accuracy-{when}"] = list(by_class.values())
            found["tested-classes"] = list(by_class)
        return found


def _unattached() -> Head:
    raise AssertionError("the loop attaches a strategy before its last step")


@register(
    "strategies",
    "ccvr",
    summary="CCVR: wraps any strategy and calibrates the classifier after its last round",
    paper="https://arxiv.org/abs/2106.05001",
    merges="weights",
)
class CcvrPlugin:
    """CCVR around the strategy named by ``base``."""

    Config = CcvrConfig

    def __init__(self, config: CcvrConfig) -> None:
        self.config = config

    def build(self, context: BuildContext) -> Ccvr:
        """Return the strategy. Raises ScenarioError where it is itself wrapped, or asks for clients that are not."""
        if context.key != "strategy":
            raise ScenarioError(
                "scenario-pairing", f"{context.key}: 'ccvr' must be the outermost strategy, or its last step is lost"
            )
        asked = self.config.clients or context.num_clients
        if asked > context.num_clients:
            raise ScenarioError(
                "scenario-cohort", f"strategy.clients is {asked}, but there are only {context.num_clients} clients"
            )
        if self.config.min_clients > asked:
            raise ScenarioError(
                "scenario-cohort", f"strategy.min_clients is {self.config.min_clients}, but only {asked} are asked"
            )
        return Ccvr(build_base(self.config.base, context), self.config, context.seed)
