"""Find trainers, strategies, data sets, partitioners and models by name, without importing them all.

Three ways to name a plug-in, all alike to the rest of the code:

- a bundled name (``fedprox``): a file in a folder that a package offers through the entry-point group
  ``trellis.providers``; only the file of that name is imported;
- a third party's entry point in ``trellis.trainers``, ``trellis.strategies`` and so on;
- a file: ``my_trainer.py:MyTrainer``, relative to the scenario file.

A plug-in is a class with a nested pydantic ``Config`` and the decorator of its group::

    @register("trainers", "fedprox", summary="...", paper="...")
    class FedProx(Trainer):
        class Config(TrainerConfig):
            mu: float = 0.01
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from trellis.errors import PluginError, listed, nearest

TRAIN_PACKAGES = frozenset({"torch", "flwr", "flwr_datasets", "sklearn", "safetensors", "PIL", "ray", "datasets"})
"""Imports that the extra ``train`` brings; an installation for an edge device has none of them."""

GROUPS = ("datasets", "partitioners", "models", "trainers", "strategies")
PROVIDERS = "trellis.providers"

ClassT = TypeVar("ClassT", bound=type)


@dataclass(frozen=True)
class Info:
    """What a plug-in says of itself, for ``trellis list`` and for checks before a run.

    ``facts`` holds what only one group needs: a trainer's ``takes`` (kinds of data), ``sends`` (what
    crosses the wire) and ``strategies`` (names it must be paired with), a strategy's ``merges``.
    """

    group: str
    name: str
    summary: str = ""
    paper: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plugin:
    """A name that can be loaded. ``load`` imports the code; nothing else does."""

    group: str
    name: str
    origin: str
    load: Callable[[], type]

    @property
    def family(self) -> str:
        """The folder that a bundled plug-in shares with its like, e.g. ``cloud edge``; empty where there is none."""
        parts = self.origin.split(".")
        return parts[2].replace("_", " ") if self.group == "trainers" and len(parts) == 4 else ""


def register(group: str, name: str, *, summary: str = "", paper: str = "", **facts: Any) -> Callable[[ClassT], ClassT]:
    """Declare a class as the plug-in ``name`` of ``group``. Checks the shape of the class at once."""
    assert group in GROUPS, group

    def declare(cls: ClassT) -> ClassT:
        if not isinstance(getattr(cls, "Config", None), type):
            raise PluginError(
                "plugin-contract",
                f"{_one(group)} {name!r} ({cls.__module__}.{cls.__qualname__}) has no nested Config class",
            )
        doc = (cls.__doc__ or "").strip().splitlines()
        cls.info = Info(group, name, summary or (doc[0] if doc else ""), paper, facts)  # type: ignore[attr-defined]
        return cls

    return declare


def info_of(cls: type) -> Info:
    """Return the declaration of a loaded plug-in class."""
    info = cls.__dict__.get("info")
    if not isinstance(info, Info):
        raise PluginError(
            "plugin-contract",
            f"{cls.__module__}.{cls.__qualname__} is not declared with @register(...)",
        )
    return info


def folder(group: str, package: str) -> list[Plugin]:
    """List the plug-ins of a package's folder tree by file name, importing none of them.

    The file ``trainers/basic/fed_prox.py`` offers ``fed-prox``. Files that start with an underscore are
    the family's shared pieces and offer nothing.
    """
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, package
    found = []
    for root in map(Path, spec.submodule_search_locations):
        for path in sorted(root.rglob("*.py")):
            if path.name.startswith("_") or "__" in path.stem:
                continue
            module = ".".join([package, *path.relative_to(root).with_suffix("").parts])
            name = path.stem.replace("_", "-")
            found.append(Plugin(group, name, module, lambda m=module, n=name: _member(m, group, n)))  # type: ignore[misc]
    return found


def _member(module: str, group: str, name: str) -> type:
    members = [
        cls
        for cls in vars(importlib.import_module(module)).values()
        if isinstance(cls, type) and isinstance(cls.__dict__.get("info"), Info) and cls.__module__ == module
    ]
    for cls in members:
        if (info_of(cls).group, info_of(cls).name) == (group, name):
            return cls
    raise PluginError("plugin-contract", f"{module} declares no {_one(group)} named {name!r}")


@cache
def plugins(group: str) -> dict[str, Plugin]:
    """Return every known plug-in of a group by name: bundled, then third parties' entry points."""
    if group not in GROUPS:
        raise PluginError(
            "plugin-group", f"no plug-in group {group!r}; there are {listed(GROUPS)}.{nearest(group, GROUPS)}"
        )
    found: dict[str, Plugin] = {}
    candidates: list[Plugin] = []
    for entry in entry_points(group=PROVIDERS):
        if entry.name.split(".")[0] == group:
            provider: Callable[[], Iterable[Plugin]] = entry.load()
            candidates.extend(provider())
    for entry in entry_points(group=f"trellis.{group}"):
        candidates.append(Plugin(group, entry.name, entry.value, entry.load))
    for plugin in candidates:
        if plugin.name in found:
            raise PluginError(
                "plugin-duplicate",
                f"two {group} are named {plugin.name!r}: {found[plugin.name].origin} and {plugin.origin}",
            )
        found[plugin.name] = plugin
    return dict(sorted(found.items()))


def load(group: str, name: str, *, base: Path | None = None) -> type:
    """Return the class behind a name, an entry point or ``file.py:Class``.

    Args:
        group: one of ``GROUPS``.
        name: what the scenario says.
        base: the folder that relative file names start from (the scenario file's).

    Raises:
        PluginError: unknown name (with the nearest one), a file that is missing or does not import, a
            class that is missing or breaks the contract.
    """
    if ".py:" in name:
        return _from_file(group, name, base or Path.cwd())
    known = plugins(group)
    if name not in known:
        raise PluginError(
            "plugin-unknown",
            f"{_one(group)}: no {_one(group)} is named {name!r}.{nearest(name, known)} Known: {listed(known)}",
        )
    try:
        cls = known[name].load()
    except PluginError:
        raise
    except Exception as error:
        raise PluginError(
            "plugin-import",
            f"{_one(group)} {name!r} ({known[name].origin}) does not import: {type(error).__name__}: {error}"
            + _advice(error),
        ) from error
    return cls


def import_file(path: Path) -> ModuleType:
    """Import a Python file under a name made from its path and content, so that workers agree on it."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    name = f"trellis_file_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _advice(error: Exception) -> str:
    missing = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return (
        ". Training and simulation need more: pip install '.[train]' in a checkout" if missing in TRAIN_PACKAGES else ""
    )


def _one(group: str) -> str:
    """Return a group's name in the singular, for messages."""
    return "strategy" if group == "strategies" else group[:-1]


def _from_file(group: str, name: str, base: Path) -> type:
    file, _, attribute = name.rpartition(":")
    path = (base / file).resolve()
    if not path.is_file():
        raise PluginError("plugin-file", f"{_one(group)}: {name!r} names the file {path}, which does not exist")
    try:
        module = import_file(path)
    except Exception as error:
        raise PluginError(
            "plugin-import", f"{_one(group)}: {path} does not import: {type(error).__name__}: {error}"
        ) from error
    cls = getattr(module, attribute, None)
    if not isinstance(cls, type):
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__]
        raise PluginError(
            "plugin-file",
            f"{_one(group)}: {path} has no class {attribute!r}.{nearest(attribute, classes)} It has: {listed(classes)}",
        )
    if info_of(cls).group != group:
        raise PluginError(
            "plugin-contract", f"{name!r} is declared as one of the {info_of(cls).group}, not of the {group}"
        )
    return cls
