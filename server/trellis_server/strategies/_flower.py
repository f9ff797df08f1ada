"""Every strategy that the installed Flower brings along, as plug-ins made from their constructors.

A parameter of the constructor becomes a key of the scenario with the same name, type and default. Left out
are functions, and the names of records and keys in messages, which the platform fixes.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from types import NoneType
from typing import Annotated, Any, ClassVar, get_args

import flwr.serverapp.strategy as flower_strategies
from flwr.serverapp.strategy import FedAvg, Strategy
from pydantic import BaseModel, Field, create_model, model_validator

from trellis.errors import ScenarioError
from trellis.registry import Plugin, register
from trellis.scenario import Component, Strict
from trellis_server.strategies._build import Base, BuildContext, Sampling, build_base, sampling

FIXED = frozenset({"weighted_by_key", "arrayrecord_key", "configrecord_key"})
PLAIN = frozenset({bool, int, float, str, NoneType})
SAMPLED = "num_sampled_clients"


@dataclass(frozen=True)
class Facts:
    """What a constructor's signature does not tell.

    Attributes:
        name: the plug-in's name where the class name is too long to type.
        merges: what the replies' arrays are.
        client_mods: Flower mods that the client app must run.
        defaults: defaults that fit our messages better than Flower's.
        robust: ``(a, b)`` where a cohort needs ``a * num_malicious_nodes + b`` replies.
    """

    name: str = ""
    merges: str = "weights"
    client_mods: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    robust: tuple[int, int] | None = None


FACTS: Mapping[str, Facts] = {
    "DifferentialPrivacyServerSideFixedClipping": Facts("dp-server-fixed"),
    "DifferentialPrivacyClientSideFixedClipping": Facts("dp-client-fixed", client_mods=("fixedclipping",)),
    "DifferentialPrivacyServerSideAdaptiveClipping": Facts("dp-server-adaptive"),
    "DifferentialPrivacyClientSideAdaptiveClipping": Facts("dp-client-adaptive", client_mods=("adaptiveclipping",)),
    "FedXgbBagging": Facts(merges="trees"),
    "FedXgbCyclic": Facts(merges="trees"),
    "QFedAvg": Facts(defaults={"train_loss_key": "loss"}),  # what our clients call it
    "Bulyan": Facts(robust=(4, 3)),  # n >= 4f + 3: El Mhamdi et al. 2018, section 4
    "Krum": Facts(robust=(2, 3)),  # n > 2f + 2: Blanchard et al. 2017, proposition 1
    "MultiKrum": Facts(robust=(2, 3)),
}


class FlowerStrategy:
    """The plug-in of one of Flower's strategies."""

    Config: ClassVar[type[BaseModel]]
    strategy_class: ClassVar[type[Strategy]]

    def __init__(self, config: BaseModel) -> None:
        self.config = config

    def build(self, context: BuildContext) -> Strategy:
        """Return the strategy. Raises ScenarioError where its parameters do not go with the cohort."""
        arguments = _given(self.config)
        names = _parameters(self.strategy_class)
        if "min_train_nodes" in names:
            arguments |= sampling(self.config, context)
            self._check_robust(_sample_size(arguments, context), context)
        if not _wraps(self.strategy_class):
            strategy = self.strategy_class(**arguments)
            if "min_train_nodes" not in names:
                _take_turns(strategy, context)
            return strategy
        base = build_base(arguments.pop("base", Component(name="fedavg")), context)
        arguments[SAMPLED] = self._sampled(base, context)
        return self.strategy_class(base, **arguments)  # type: ignore[call-arg]

    def _check_robust(self, cohort: int, context: BuildContext) -> None:
        rule = _facts(self.strategy_class).robust
        if rule is None:
            return
        malicious = getattr(self.config, "num_malicious_nodes", 0)
        needed = rule[0] * malicious + rule[1]
        if cohort < needed:
            raise ScenarioError(
                "scenario-cohort",
                f"{context.key}: {self.strategy_class.__name__} against {malicious} malicious nodes needs a cohort of "
                f"at least {needed}, but {cohort} clients train in a round",
            )

    def _sampled(self, base: Strategy, context: BuildContext) -> int:
        """Return how many clients the base samples; the privacy noise is scaled by it."""
        sampled = context.cohort
        if isinstance(base, FedAvg):
            sampled = _sample_size(vars(base), context)
        given = getattr(self.config, SAMPLED)
        if given not in (None, sampled):
            raise ScenarioError(
                "scenario-cohort",
                f"{context.key}.{SAMPLED} is {given}, but {sampled} clients are sampled; the noise would be wrong",
            )
        return sampled


def plugins() -> list[Plugin]:
    """Return a plug-in for every concrete strategy that ``flwr.serverapp.strategy`` exports."""
    exported = (getattr(flower_strategies, name) for name in flower_strategies.__all__)
    return [
        Plugin("strategies", _name(cls), f"flwr.serverapp.strategy.{cls.__name__}", partial(plugin_class, cls))
        for cls in exported
        if inspect.isclass(cls) and issubclass(cls, Strategy) and not inspect.isabstract(cls) and _buildable(cls)
    ]


@cache
def plugin_class(cls: type[Strategy]) -> type[FlowerStrategy]:
    """Return the plug-in class of a Flower strategy, with a ``Config`` made from its constructor."""
    facts = _facts(cls)
    members = {"__doc__": cls.__doc__, "__module__": __name__, "Config": _config(cls), "strategy_class": cls}
    made = type(cls.__name__, (FlowerStrategy,), members)
    declare = register("strategies", _name(cls), paper=_paper(cls), merges=facts.merges, client_mods=facts.client_mods)
    return declare(made)


def _facts(cls: type[Strategy]) -> Facts:
    return FACTS.get(cls.__name__, Facts())


def _name(cls: type[Strategy]) -> str:
    name = _facts(cls).name
    if name:
        return name
    if _wraps(cls):
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()
    return cls.__name__.lower()


def _paper(cls: type[Strategy]) -> str:
    """Return the first address of a paper in the class's text, else in its module's."""
    text = f"{cls.__doc__}\n{sys.modules[cls.__module__].__doc__}"
    found = re.search(r"(?:https?://)?((?:arxiv\.org|openreview\.net)/[^\s,;)\]]+)", text)
    return f"https://{found.group(1).rstrip('.')}" if found else ""


def _signature(cls: type[Strategy]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls, eval_str=True).parameters


def _kinds(parameter: inspect.Parameter) -> frozenset[Any]:
    return frozenset(get_args(parameter.annotation) or (parameter.annotation,))


def _parameters(cls: type[Strategy]) -> dict[str, inspect.Parameter]:
    """Return the constructor's parameters that a scenario can set."""
    return {name: p for name, p in _signature(cls).items() if name not in FIXED and _kinds(p) <= PLAIN}


def _wraps(cls: type[Strategy]) -> bool:
    first = next(iter(_signature(cls).values()), None)
    return first is not None and first.annotation is Strategy


def _buildable(cls: type[Strategy]) -> bool:
    """Whether all that the constructor insists on can be said in a scenario."""
    known = _parameters(cls).keys() | FIXED
    needed = [name for name, p in _signature(cls).items() if p.default is p.empty and name not in known]
    return not needed[1:] if _wraps(cls) else not needed


def _config(cls: type[Strategy]) -> type[BaseModel]:
    parameters = _parameters(cls)
    fields: dict[str, Any] = {"base": (Base, Component(name="fedavg"))} if _wraps(cls) else {}
    for name, parameter in parameters.items():
        if name == SAMPLED:
            fields[name] = (Annotated[int, Field(gt=0)] | None, None)
        elif name not in Sampling.model_fields:
            # Every whole number among the parameters is a count.
            kind = Annotated[int, Field(ge=0)] if parameter.annotation is int else parameter.annotation
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (kind, _facts(cls).defaults.get(name, default))

    def tried(config: BaseModel) -> BaseModel:
        """Let the constructor judge the values now, before any work starts."""
        arguments = _given(config)
        arguments.pop("base", None)
        if SAMPLED in parameters:
            arguments.setdefault(SAMPLED, sys.maxsize)  # the cohort is not known yet
        with _silent():
            cls(*[FedAvg()] if _wraps(cls) else [], **arguments)
        return config

    return create_model(
        "Config",
        __base__=Sampling if "min_train_nodes" in parameters else Strict,
        __module__=__name__,
        __validators__={"tried": model_validator(mode="after")(tried)},  # type: ignore[dict-item]
        **fields,
    )


def _given(config: BaseModel) -> dict[str, Any]:
    return {name: value for name, value in config if value is not None}


def _sample_size(sampled_by: Mapping[str, Any], context: BuildContext) -> int:
    """Return how many clients train in a round, by Flower's rule."""
    share, least = float(sampled_by["fraction_train"]), int(sampled_by["min_train_nodes"])
    return max(int(context.num_clients * share), least)


def _take_turns(strategy: Strategy, context: BuildContext) -> None:
    """Make a strategy that picks one of all nodes, in turn, see all nodes in every round."""
    if context.cohort_key and context.cohort != 1:
        raise ScenarioError(
            "scenario-cohort",
            f"{context.cohort_key} is {context.cohort}, but {type(strategy).__name__} trains one client a round",
        )
    if isinstance(strategy, FedAvg):
        strategy.min_train_nodes = strategy.min_evaluate_nodes = strategy.min_available_nodes = context.num_clients


@contextmanager
def _silent() -> Iterator[None]:
    """Keep Flower's warnings for the strategy that is used, not for the one that is tried."""
    logger = logging.getLogger("flwr")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
