"""Export the final model of a finished run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from trellis import __version__, records, registry, scenario, seeding
from trellis.data.base import DataSet
from trellis.errors import DataError, RunError, TrellisError, listed, nearest
from trellis.runs import Run
from trellis.scenario import Scenario
from trellis_clients import batchnorm
from trellis_clients.export.models import Report, check_options, export_model
from trellis_clients.site import Cell, Site

TEST = 10_000
"""Most examples that accuracy is measured on."""


def export_run(
    path: Path,
    to: Path,
    *,
    precision: str = "int8",
    variant: str | None = None,
    seed: int | None = None,
    max_drop: float | None = None,
    calibration: int = 256,
) -> Report:
    """Export the final model of one cell of a run.

    Args:
        path: the run's folder.
        to: where to write the file.
        precision: ``int8`` or ``none``.
        variant: which one; may be left out where there is one.
        seed: likewise.
        max_drop: most percentage points of accuracy that may be lost.
        calibration: how many training examples ranges are measured on.

    Raises:
        RunError: there is no such cell, it is not finished, or its files are damaged.
        TrellisError: the model or its data cannot be exported; see ``export_model``.
    """
    check_options(to, precision, max_drop)
    if calibration < 1:
        raise TrellisError("export-option", f"calibration={calibration}: expected at least 1 example")
    each, seed, folder = _cell(Run.open(path), variant, seed)
    arrays, summary = _final(folder)
    whole = scenario.plain(each)
    whole["runtime"]["device"] = "cpu"
    site = Site(Cell(whole, seed))
    if set(arrays) != set(site.names):
        name = sorted(set(arrays) ^ set(site.names))[0]
        raise RunError("run-damaged", f"{folder / 'model.safetensors'} does not fit the scenario's model: {name!r}")
    _check_whole(site)
    site.load({name: torch.from_numpy(values) for name, values in arrays.items()}, {})
    x, test = _examples(site.federation.data, seed, calibration)
    _settle_statistics(site, x)
    facts = site.federation.data.facts
    return export_model(
        site.model,
        to,
        classes=site.federation.data.classes,
        shape=site.federation.data.example_shape,
        calibration=x,
        precision=precision,
        test=test,
        max_drop=max_drop,
        preprocessing={key: [float(v) for v in facts[key]] for key in ("mean", "std") if key in facts},
        source={
            "scenario": each.name,
            "scenario_sha256": _digest(whole),
            "run": f"{path.resolve().parent.name}/{path.resolve().name}",
            "variant": folder.name.rpartition("-seed")[0],
            "seed": seed,
            "rounds": summary["rounds"],
            "weights_sha256": summary["sha256"],
            "trellis": __version__,
        },
    )


def _cell(run: Run, variant: str | None, seed: int | None) -> tuple[Scenario, int, Path]:
    """Return the scenario, seed and folder of the cell that is meant."""
    variants = {name or "main": each for name, each in scenario.expand(run.scenario)}
    chosen = _one_of("variant", variant, list(variants))
    number = int(_one_of("seed", None if seed is None else str(seed), [str(known) for known in run.scenario.seeds]))
    return variants[chosen], number, run.path / "cells" / f"{chosen}-seed{number}"


def _one_of(what: str, given: str | None, known: list[str]) -> str:
    if given is None and len(known) == 1:
        return known[0]
    if given in known:
        return str(given)
    if given is None:
        raise RunError(
            "export-cell", f"the run has several {what}s: say which with --{what}. There are {listed(known)}"
        )
    raise RunError("export-cell", f"the run has no {what} {given!r}.{nearest(given, known)} There are {listed(known)}")


def _final(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return a finished cell's weights, by the names that travel, and its summary."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        arrays = load((folder / "model.safetensors").read_bytes())
        if records.digest(records.array_record(arrays)) != summary["sha256"]:
            raise RunError("run-damaged", f"{folder / 'model.safetensors'} is not the model that the run ended with")
    except FileNotFoundError as error:
        raise RunError(
            "export-unfinished",
            f"{folder.name} holds no final model ({Path(error.filename).name} is not there): finish it with"
            f" trellis run --resume {folder.parent.parent}",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError("run-damaged", f"{folder}: not readable: {type(error).__name__}: {error}") from None
    return arrays, summary


def _examples(
    data: DataSet, seed: int, count: int
) -> tuple[NDArray[np.float32], tuple[NDArray[np.float32], NDArray[np.int64]] | None]:
    """Return calibration examples of the training data, and held-out examples with labels.

    Without held-out data, training examples that were not drawn for calibration stand in.
    """
    if not data.classes or "x" not in data.train.fields or not data.train.fields["x"].is_floating_point():
        raise DataError("export-data", f"only classifiers of images or vectors are exported; these are {data.kind!r}")
    order = seeding.numpy_generator(seed, "export", "calibration").permutation(len(data.train))
    drawn = data.train.batch(torch.from_numpy(np.sort(order[:count])))
    left = data.test.batch(torch.arange(min(len(data.test), TEST)))
    if not len(left):
        left = data.train.batch(torch.from_numpy(np.sort(order[count : count + TEST])))
    return drawn.x.numpy(), (left.x.numpy(), left.y.numpy()) if len(left) else None


def _check_whole(site: Site) -> None:
    """Refuse a run that ends with parts of a model, of which the rest is with the clients or in other hands.

    What a trainer builds alike on every side, from the seed or a file, need not be in the run: a frozen base. But the
    devices of an adaptation take their source model from a message, and a mission's prototypes are no head.
    """
    sends = registry.info_of(type(site.trainer)).facts.get("sends")
    if sends in ("uploads", "missions"):
        raise TrellisError(
            "export-partial",
            f"trainer {site.scenario.trainer.name!r} sends {sends}: the run ends with what was adapted or learnt on top"
            " of a model that is not in it. Export the model that it started from",
        )
    if kept := sorted(site.trainer.kept(site.model) - batchnorm.private_names(site.model, "local")):
        raise TrellisError(
            "export-local", f"the run's clients keep a part of the model ({kept[0]!r}), so it has no whole one"
        )


def _settle_statistics(site: Site, x: NDArray[np.float32]) -> None:
    """Give batch norms source statistics where the clients of the run keep theirs."""
    if not batchnorm.layers(site.model):
        return
    policy = site.scenario.trainer.params.get("batch_norm", "average")
    if policy == "local":
        raise TrellisError(
            "export-local",
            "the run's clients keep their batch-norm layers (trainer.batch_norm: local), so it has no whole model",
        )
    if policy == "recalibrate":
        batchnorm.recalibrate(site.model, torch.split(torch.from_numpy(x), 64))


def _digest(whole: dict[str, Any]) -> str:
    """Return the SHA-256 of a complete scenario, wherever its file lies."""
    told = {key: value for key, value in whole.items() if key != "base"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
