"""From a scenario to a Flower strategy that samples the scenario's cohort.

A strategy plug-in is a class with a ``Config`` and two methods: ``__init__(config)`` and
``build(context) -> flwr.serverapp.strategy.Strategy``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from trellis import registry
from trellis.errors import PluginError, ScenarioError
from trellis.scenario import Component, Scenario, Strict, config_of, explain

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

TINY = 1e-12
"""A share of the nodes that is not zero, which would mean "never", and comes to no node by itself."""


@dataclass(frozen=True)
class BuildContext:
    """What a strategy is built for.

    Attributes:
        cohort: clients that train in a round.
        evaluators: clients that evaluate in a round; 0 for none.
        num_clients: all clients there are.
        seed: the seed of this cell of the experiment.
        folder: where relative file names of the scenario start from.
        key: the key of the scenario that the strategy stands at, for messages.
        cohort_key: the key that sets ``cohort``, where the scenario sets it; likewise ``evaluators_key``.
    """

    cohort: int
    evaluators: int
    num_clients: int
    seed: int
    folder: Path
    key: str = "strategy"
    cohort_key: str | None = None
    evaluators_key: str | None = None


class StrategyPlugin(Protocol):
    """What a class of the group ``strategies`` can do."""

    Config: type[BaseModel]

    def __init__(self, config: Any) -> None: ...

    def build(self, context: BuildContext) -> Strategy: ...


Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Nodes = Annotated[int, Field(ge=1)]


class Sampling(Strict):
    """How Flower samples nodes, for those who want it done otherwise than by the scenario's cohort sizes."""

    fraction_train: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of the nodes that train; the cohort is rounds.clients_per_round if not given"
    )
    fraction_evaluate: Share | None = Field(
        None, description="share of the nodes that evaluate; the cohort is evaluation.clients if not given"
    )
    min_train_nodes: Nodes | None = Field(None, description="train at least this many nodes")
    min_evaluate_nodes: Count | None = Field(None, description="evaluate on at least this many nodes")
    min_available_nodes: Nodes | None = Field(None, description="wait until this many nodes are there")


def sampling(config: Any, context: BuildContext) -> dict[str, Any]:
    """Return the five sampling arguments of ``FedAvg`` and its kin.

    Flower samples ``max(int(nodes * fraction), minimum)``. Without a user's wish the minimum is the cohort and
    the fraction adds nothing to it.

    Args:
        config: has the fields of ``Sampling``.
        context: the cohort sizes.

    Raises:
        ScenarioError: the scenario sets the cohort in two places, or asks for more nodes than there are, for
            which Flower would wait for ever.
    """
    available = config.min_available_nodes
    return {
        **_phase(config, context, "train", context.cohort, context.cohort_key),
        **_phase(config, context, "evaluate", context.evaluators, context.evaluators_key),
        "min_available_nodes": context.cohort
        if available is None
        else _there_are(available, context, f"{context.key}.min_available_nodes"),
    }


def _phase(config: Any, context: BuildContext, phase: str, size: int, size_key: str | None) -> dict[str, Any]:
    names = (f"fraction_{phase}", f"min_{phase}_nodes")
    fraction, least = (getattr(config, name) for name in names)
    own = [f"{context.key}.{name}" for name in names if getattr(config, name) is not None]
    if not own:
        return {names[0]: TINY, names[1]: _there_are(size, context, size_key or "clients")}
    if size_key:
        raise ScenarioError("scenario-cohort", f"{size_key} and {own[0]} both set the size of a cohort; keep one")
    if least is not None:
        _there_are(least, context, f"{context.key}.{names[1]}")
    return {names[0]: 1.0 if fraction is None else fraction, names[1]: 1 if least is None else least}


def _there_are(nodes: int, context: BuildContext, key: str) -> int:
    if nodes > context.num_clients:
        raise ScenarioError("scenario-cohort", f"{key} is {nodes}, but there are only {context.num_clients} clients")
    return nodes


def build_strategy(scenario: Scenario, num_clients: int, seed: int) -> Strategy:
    """Build the scenario's strategy.

    Args:
        scenario: names the strategy, its parameters and the cohort sizes.
        num_clients: how many clients there are; the partitioner may know more than the scenario says.
        seed: the seed of this cell.

    Raises:
        ScenarioError: a parameter is wrong, or the cohort is set twice or cannot be had.
        PluginError: the strategy is unknown or breaks the contract.
    """
    cls, config = config_of(scenario, "strategies")
    size, evaluators = scenario.rounds.clients_per_round, scenario.evaluation.clients
    context = BuildContext(
        cohort=size or num_clients,
        evaluators=(evaluators or num_clients) if scenario.evaluation.federated_every else 0,
        num_clients=num_clients,
        seed=seed,
        folder=scenario.folder,
        cohort_key="rounds.clients_per_round" if size else None,
        evaluators_key="evaluation.clients" if evaluators else None,
    )
    return _build(cls, config, scenario.strategy.name, context)


def _build(cls: type, config: BaseModel, name: str, context: BuildContext) -> Strategy:
    from flwr.serverapp.strategy import Strategy

    if not callable(getattr(cls, "build", None)):
        raise PluginError("plugin-contract", f"strategy {name!r} has no method build(context)")
    try:
        strategy = cls(config).build(context)
    except ValueError as error:
        # Flower's constructors check what they are given this way.
        raise ScenarioError("scenario-invalid", f"{context.key}: {error}") from None
    if not isinstance(strategy, Strategy):
        kind = type(strategy).__name__
        raise PluginError("plugin-contract", f"strategy {name!r}: build(context) gave {kind}, not a Flower Strategy")
    return strategy


_place: ContextVar[str] = ContextVar("place", default="strategy")
"""The key of the strategy that is being checked: validators do not know where in the file they stand."""


@contextmanager
def _inside(key: str) -> Iterator[None]:
    token = _place.set(key)
    try:
        yield
    finally:
        _place.reset(token)


def _base_config(base: Component, key: str, folder: Path | None) -> tuple[type, BaseModel]:
    cls = registry.load("strategies", base.name, base=folder)
    merges = registry.info_of(cls).facts.get("merges", "weights")
    if merges != "weights":
        raise ScenarioError(
            "scenario-pairing", f"{key}: {base.name!r} merges {merges}; what wraps it needs one that merges weights"
        )
    model: type[BaseModel] = cls.Config  # type: ignore[attr-defined]
    try:
        with _inside(key):
            return cls, model.model_validate(base.params)
    except ValidationError as error:
        raise ScenarioError("scenario-invalid", explain(error, model, key)) from None


def _checked(base: Component) -> Component:
    # A file is found relative to the scenario's folder, which is known only when the strategy is built.
    if ".py:" not in base.name:
        _base_config(base, f"{_place.get()}.base", None)
    return base


Base = Annotated[Component, AfterValidator(_checked)]
"""The field ``base`` of a strategy that wraps another: the other's name with its parameters beside it."""


def build_base(base: Component, context: BuildContext) -> Strategy:
    """Build the strategy that another one wraps. Errors name keys such as ``strategy.base.server_momentum``."""
    key = f"{context.key}.base"
    cls, config = _base_config(base, key, context.folder)
    return _build(cls, config, base.name, replace(context, key=key))
