"""The scenario file: what to run, read from YAML into strict typed models.

``load(path)`` reads, applies overrides, and checks everything that can be known before work starts:
keys, types, plug-in names, plug-in parameters, and that the parts fit one another. What it returns is
complete: written back with ``dump`` and read again, it is the same scenario.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trellis import registry, safe_yaml
from trellis.errors import ScenarioError, listed, nearest

COMPONENTS = {
    "datasets": "data",
    "partitioners": "partition",
    "models": "model",
    "trainers": "trainer",
    "strategies": "strategy",
}
"""Plug-in groups and the keys of the scenario that name them."""

ModelT = TypeVar("ModelT", bound=BaseModel)

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class Strict(BaseModel):
    """Unknown keys, wrong types, NaN and infinity are errors; values cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Component(BaseModel):
    """A plug-in by name, with its own parameters beside the name."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def params(self) -> dict[str, Any]:
        """The parameters without the name."""
        return dict(self.model_extra or {})


class Rounds(Strict):
    """How many rounds, who takes part, and when a round ends."""

    count: Positive = 10
    clients_per_round: Positive | None = Field(
        None, description="size of the training cohort; all clients if not given"
    )
    deadline_s: Seconds = Field(600.0, description="a phase of a round ends here at the latest")
    quorum: Share = Field(
        0.8, description="share of the cohort that must reply and pass the screen, or the round fails"
    )


class Evaluation(Strict):
    """Where and how often the model is evaluated. Zero switches an evaluation off."""

    central_every: Annotated[int, Field(ge=0)] = Field(1, description="on the held-out set, every k rounds")
    federated_every: Annotated[int, Field(ge=0)] = Field(
        1, description="on the clients' own test splits, every k rounds"
    )
    clients: Positive | None = Field(None, description="cohort of the federated evaluation; all if not given")
    batch_size: Positive = 256


class Screening(Strict):
    """The admission gate. Every reply passes it before a strategy sees it."""

    enabled: bool = True
    max_examples: Positive = Field(1_000_000, description="largest example count a client may claim")
    max_norm_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = Field(
        10.0, description="largest update norm over the running median; null switches this off"
    )
    min_cosine: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        -0.5, description="smallest cosine of an update with the cohort's direction; null switches this off"
    )
    allow_unchanged: bool = Field(False, description="admit replies that equal the model that was sent")
    quarantine_after: Positive | None = Field(
        3, description="offences after which a client's replies are no longer read; null means never"
    )


class Checkpoint(Strict):
    """How often the state of a run is written, and how many such states are kept."""

    every: Positive = 1
    keep: Positive = 2


class Probe(Strict):
    """Measure the framework's own overhead by replaying a round as a bare loop."""

    every: Annotated[int, Field(ge=0)] = Field(20, description="replay every k-th round; zero switches it off")
    least: Annotated[int, Field(ge=0)] = Field(3, description="replay at least this often in a run")


class Runtime(Strict):
    """Where the clients run in simulation."""

    grid: Literal["local", "ray"] = "ray"
    workers: Positive | None = Field(None, description="Ray actors; one per core if not given")
    threads: Positive = Field(1, description="torch threads per worker; changing it changes the last bits")
    gpus_per_worker: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    memory_per_worker_mb: Positive | None = Field(None, description="a worker above this is stopped and replaced")
    address: str | None = Field(None, description="an existing Ray cluster, e.g. 'auto' or '10.0.0.1:6379'")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = Field(True, description="ask torch for deterministic kernels")


class Scenario(Strict):
    """One scenario: data, model, trainer, strategy, rounds, evaluation, runtime, seeds, variants."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    description: str = ""
    data: Component
    clients: Positive | None = Field(
        None, description="number of clients; needed unless the partitioner knows it (natural ids)"
    )
    partition: Component = Component(name="iid")
    model: Component = Component(name="auto")
    trainer: Component = Component(name="sgd")
    strategy: Component = Component(name="fedavg")
    rounds: Rounds = Rounds()
    evaluation: Evaluation = Evaluation()
    screening: Screening = Screening()
    checkpoint: Checkpoint = Checkpoint()
    probe: Probe = Probe()
    runtime: Runtime = Runtime()
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)] = (0,)
    variants: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")], dict[str, Any]] = {}
    base: str = Field("", description="folder that relative file names start from; set when the file is read")

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        value = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, list) else value
        if isinstance(value, tuple) and len(set(map(repr, value))) != len(value):
            raise ValueError("a seed stands twice")
        return value

    @model_validator(mode="after")
    def _cohorts(self) -> Self:
        if self.clients is not None and (problem := _cohort_problem(self, self.clients)):
            raise ValueError(problem)
        return self

    @property
    def folder(self) -> Path:
        """Where relative file names start from."""
        return Path(self.base or ".")

    def component(self, group: str) -> Component:
        """Return the component of a plug-in group, e.g. ``component("trainers")``."""
        component: Component = getattr(self, COMPONENTS[group])
        return component


def _cohort_problem(scenario: Scenario, clients: int) -> str:
    for key, cohort in (
        ("rounds.clients_per_round", scenario.rounds.clients_per_round),
        ("evaluation.clients", scenario.evaluation.clients),
    ):
        if cohort is not None and cohort > clients:
            return f"{key} is {cohort}, but there are only {clients} clients"
    return ""


def check_cohorts(scenario: Scenario, clients: int) -> None:
    """Check cohort sizes against the number of clients that dealing the data has shown (natural ids)."""
    if problem := _cohort_problem(scenario, clients):
        raise ScenarioError("scenario-cohort", problem)


def read(path: Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read a scenario file and apply ``key.path=value`` overrides, without looking up any plug-in.

    Raises:
        ScenarioError: the file is missing or not YAML; a key, type or value is wrong.
    """
    if not path.is_file():
        raise ScenarioError("scenario-missing", f"no scenario file at {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ScenarioError("scenario-yaml", f"{path}: not UTF-8 text") from None
    raw = safe_yaml.parse(text, str(path))
    if not isinstance(raw, dict):
        raise ScenarioError("scenario-yaml", f"{path}: expected keys and values at the top, got {type(raw).__name__}")
    raw.setdefault("base", str(path.resolve().parent))
    for override in overrides:
        raw = with_override(raw, override)
    return from_mapping(raw, str(path))


def load(path: Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read a scenario file and check it whole, plug-ins included. See ``read`` and ``check``."""
    scenario = read(path, overrides)
    check(scenario)
    return scenario


def with_override(raw: Mapping[str, Any], override: str) -> dict[str, Any]:
    """Return a copy of ``raw`` with one ``a.b.c=value`` applied. The value is read as YAML.

    Setting a component's name (``trainer=saf``, ``trainer.name=saf``) drops the parameters of the old one.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ScenarioError("scenario-override", f"--set {override!r}: expected key.path=value")
    value = safe_yaml.parse(text, f"--set {key}")
    component = parts[0] in COMPONENTS.values()
    if component and len(parts) == 2 and parts[1] == "name":
        parts, value = parts[:1], {"name": value}
    result = json.loads(json.dumps(dict(raw)))
    place = result
    for part in parts[:-1]:
        if isinstance(place.get(part), str) and component:
            place[part] = {"name": place[part]}
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ScenarioError("scenario-override", f"--set {override!r}: {part!r} holds no keys")
    place[parts[-1]] = value
    return dict(result)


def from_mapping(raw: Mapping[str, Any], source: str = "scenario") -> Scenario:
    """Build a ``Scenario`` from plain data, turning the first validation error into one line."""
    try:
        return validated(Scenario, raw)
    except ValidationError as error:
        raise ScenarioError("scenario-invalid", f"{source}: {explain(error, Scenario)}") from None


def validated(model: type[ModelT], raw: Mapping[str, Any]) -> ModelT:
    """Validate plain data as JSON, where a list may stand for a tuple and nothing else is converted."""
    return model.model_validate_json(json.dumps(dict(raw), default=str))


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Say the first problem of a validation error: key, value, what is allowed, nearest right name."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    path = ".".join(part for part in (prefix, where) if part)
    if problem["type"] == "extra_forbidden":
        owner = _model_at(model, problem["loc"][:-1])
        known = list(owner.model_fields)
        name = str(problem["loc"][-1])
        return f"unknown key {path!r}.{nearest(name, known)} Allowed here: {listed(known)}"
    if problem["type"] == "missing":
        return f"key {path!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not path:
        return message
    value = problem["input"]
    return f"{path}: {message} (got {value!r})" if len(repr(value)) < 100 else f"{path}: {message}"


def _model_at(model: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel]:
    for part in loc:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        inner = [a for a in candidates if isinstance(a, type) and issubclass(a, BaseModel)]
        if not inner:
            break
        model = inner[0]
    return model


def config_of(scenario: Scenario, group: str) -> tuple[type, Any]:
    """Return a component's class and its validated ``Config``.

    Raises:
        PluginError: the name is unknown or does not load.
        ScenarioError: a parameter is unknown or wrong; the key is given as e.g. ``trainer.lr``.
    """
    component = scenario.component(group)
    cls = registry.load(group, component.name, base=scenario.folder)
    model: type[BaseModel] = cls.Config  # type: ignore[attr-defined]
    try:
        return cls, validated(model, component.params)
    except ValidationError as error:
        raise ScenarioError("scenario-invalid", explain(error, model, COMPONENTS[group])) from None


def check(scenario: Scenario) -> None:
    """Check plug-in names, parameters, variants, and that data, trainer and strategy fit one another."""
    for _, each in expand(scenario):
        loaded = {group: config_of(each, group)[0] for group in registry.GROUPS}
        trainer, strategy = registry.info_of(loaded["trainers"]), registry.info_of(loaded["strategies"])
        takes = trainer.facts.get("takes")
        kind = registry.info_of(loaded["datasets"]).facts.get("kind")
        if takes is not None and kind is not None and kind not in takes:
            raise ScenarioError(
                "scenario-data-kind",
                f"trainer {each.trainer.name!r} takes {listed(takes)} data, but data {each.data.name!r} are {kind!r}",
            )
        pairs = trainer.facts.get("strategies")
        if pairs is not None and each.strategy.name not in pairs:
            raise ScenarioError(
                "scenario-pairing",
                f"trainer {each.trainer.name!r} needs strategy {listed(pairs)}, not {each.strategy.name!r}",
            )
        sends, merges = trainer.facts.get("sends", "weights"), strategy.facts.get("merges", "weights")
        if sends != merges:
            raise ScenarioError(
                "scenario-pairing",
                f"trainer {each.trainer.name!r} sends {sends}, but strategy {each.strategy.name!r} merges {merges}",
            )


def expand(scenario: Scenario) -> list[tuple[str, Scenario]]:
    """Return the scenario's variants by name, each complete in itself; without variants, itself as ``""``.

    A variant's component replaces the base's where its name differs, and adds to it where it does not.
    """
    if not scenario.variants:
        return [("", scenario)]
    base = plain(scenario)
    base.pop("variants")
    result = []
    for name, changes in scenario.variants.items():
        for key in ("seeds", "variants", "name", "base"):
            if key in changes:
                raise ScenarioError("scenario-variant", f"variants.{name}: {key!r} cannot differ between variants")
        result.append((name, from_mapping(_merge(base, changes), f"variants.{name}")))
    return result


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if key in COMPONENTS.values():
            value = {"name": value} if isinstance(value, str) else value
            if not isinstance(value, dict) or not isinstance(old, dict):
                merged[key] = value
            elif value.get("name", old.get("name")) == old.get("name"):
                merged[key] = {**old, **value}
            else:
                merged[key] = value
        elif isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def plain(scenario: Scenario) -> dict[str, Any]:
    """Return the scenario as plain data, complete with all defaults of the schema."""
    data: dict[str, Any] = json.loads(scenario.model_dump_json())
    return data


def dump(scenario: Scenario) -> str:
    """Return the scenario as YAML that ``read`` turns back into an equal scenario."""
    return yaml.safe_dump(plain(scenario), sort_keys=False, allow_unicode=True)


@lru_cache
def schema() -> dict[str, Any]:
    """Return the JSON Schema of scenario files, for editors."""
    return Scenario.model_json_schema()
