"""A runnable scenario for a trainer: one of the project's own where there is one, else the shortest that fits."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

from trellis import registry, scenario
from trellis.errors import TrellisError, listed


def of_trainer(name: str) -> tuple[str, Path | None]:
    """Return the text of a scenario that uses a trainer, and its file if it is one of the project's.

    Raises:
        PluginError: there is no such trainer.
    """
    own = folder() / "trainers" / f"{name}.yaml"
    for path in [own, *(path for path in files() if path != own)]:
        if path.is_file() and name in _trainers(path):
            return path.read_text(), path
    facts = registry.info_of(registry.load("trainers", name)).facts
    strategy = next(iter(facts.get("strategies") or ("fedavg",)))
    label = Path(name.partition(".py:")[0]).name.replace("_", "-").lower()  # a file's name, of my_method.py:MyMethod
    lines = (f"name: {label}", f"data: {_data(facts.get('takes'))}", "clients: 4", f"trainer: {{name: {name}}}")
    return "\n".join([*lines, f"strategy: {strategy}", "rounds: {count: 5}", ""]), None


def _data(takes: Collection[str] | None) -> str:
    """Return a data set of a kind that a trainer takes and that needs no parameters; ``digits`` where it will do.

    Of kinds that no bundled data set is of, e.g. series, there is only what a person has: a place to name it.
    """
    if takes is None or "image" in takes:
        return "digits"
    for name, plugin in registry.plugins("datasets").items():
        cls: Any = plugin.load()
        required = any(field.is_required() for field in cls.Config.model_fields.values())
        if not required and registry.info_of(cls).facts.get("kind") in takes:
            return name
    return f"{{name: npz, path: your.npz}}  # {listed(takes)}"


def folder() -> Path:
    """Return where the scenarios are: inside an installed package, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    inside = here / "scenarios"
    return inside if inside.is_dir() else here.parents[1] / "scenarios"


@cache
def files() -> tuple[Path, ...]:
    """Return all scenario files, the shortest first."""
    return tuple(sorted(folder().glob("**/*.yaml"), key=lambda path: (path.stat().st_size, path.name)))


@cache
def _trainers(path: Path) -> frozenset[str]:
    """Return the trainers that a file and its variants name."""
    try:
        return frozenset(each.trainer.name for _, each in scenario.expand(scenario.read(path)))
    except TrellisError:
        return frozenset()
