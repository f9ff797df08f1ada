"""What Flower's run config says to Trellis: which scenario, variant and seed this Flower run is of.

Both halves of the app read it by themselves, each in its own process and maybe on its own machine. Keys:

- ``scenario``: an absolute path, or the name of a file that travels inside the Flower app's bundle;
- ``set``: overrides as in ``trellis run --set``, separated by semicolons;
- ``variant``: the first one if empty;
- ``seed``: the scenario's first one if negative.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trellis import scenario
from trellis.errors import ScenarioError, listed, nearest
from trellis.scenario import Scenario

KEYS = ("scenario", "set", "variant", "seed", "runs")
"""Keys of the run config. ``runs``, the server's folder for runs, is the only one that clients do not read."""


def read(run_config: Mapping[str, Any]) -> Scenario:
    """Return the one cell that a Flower run is: a scenario without variants and with one seed.

    Raises:
        ScenarioError: no scenario is named, its file is not there, or it cannot be run.
    """
    text = str(run_config.get("scenario", ""))
    if not text:
        raise ScenarioError("scenario-missing", "the Flower run config has no key 'scenario' with the name of a file")
    overrides = [part.strip() for part in str(run_config.get("set", "")).split(";") if part.strip()]
    loaded = scenario.load(find(text), overrides)
    variants = dict(scenario.expand(loaded))
    name = str(run_config.get("variant", "")) or next(iter(variants))
    if name not in variants:
        raise ScenarioError(
            "scenario-variant",
            f"run config: variant {name!r} is not one of {listed(variants)}.{nearest(name, variants)}",
        )
    seed = int(run_config.get("seed", -1))
    return variants[name].model_copy(update={"seeds": (loaded.seeds[0] if seed < 0 else seed,), "variants": {}})


def find(text: str) -> Path:
    """Return the path of a scenario file; a relative one starts from the Flower app's folder.

    Flower unpacks the app on every machine at a place of its own and puts that on the import path of every
    process; no process is started there.

    Raises:
        ScenarioError: no Flower app on the import path holds such a file.
    """
    path = Path(text).expanduser()
    if path.is_absolute():
        return path
    for folder in map(Path, sys.path):
        if (folder / "pyproject.toml").is_file() and (folder / path).is_file():
            return (folder / path).resolve()
    raise ScenarioError(
        "scenario-missing",
        f"run config: scenario {text!r} is not a file in the Flower app's folder (Flower packs .yaml, .yml, .json, "
        ".toml, .py and .md files), nor an absolute path",
    )
