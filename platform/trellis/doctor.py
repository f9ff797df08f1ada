"""Does this scenario fit this machine? Looked at before the first round, with figures."""

from __future__ import annotations

import importlib.util
import os
import socket
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from trellis import scenario as scenario_file
from trellis.errors import TrellisError
from trellis.scenario import Scenario

WORKER_BASE_MB = 550
"""Resident memory of a process that has imported torch, Ray, Flower, flwr-datasets and scikit-learn and loaded nothing:
513 MB were read with torch 2.13 (CPU), ray 2.55 and flwr 1.41 on Linux; rounded up."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``level`` is ok, warn (may be slow or tight) or fail (will not run)."""

    level: Literal["ok", "warn", "fail"]
    subject: str
    text: str


def examine(scenario: Scenario) -> list[Finding]:
    """Look at packages, data, cores, memory, GPU, disk and ports for a scenario that is already valid."""
    findings: list[Finding] = []
    for look in (_packages, _data_and_memory, _cores, _gpu, _disk, _address):
        try:
            findings.extend(look(scenario))
        except TrellisError as error:
            findings.append(Finding("fail", look.__name__.strip("_").split("_")[0], str(error)))
    return findings


def _packages(scenario: Scenario) -> list[Finding]:
    from packaging.requirements import Requirement

    findings = []
    wanted = [Requirement(text) for text in requires("trellis") or []]
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": "train"}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            findings.append(
                Finding("fail", "packages", f"{requirement.name} is missing; pip install '.[train]' in a checkout")
            )
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            findings.append(
                Finding("fail", "packages", f"{requirement.name} is {found}; needed {requirement.specifier}")
            )
    if scenario.model.name == "timm" and importlib.util.find_spec("timm") is None:
        findings.append(Finding("fail", "packages", "model 'timm' needs the package timm: pip install timm"))
    return findings or [Finding("ok", "packages", f"all {len(wanted)} requirements fit")]


def _data_and_memory(scenario: Scenario) -> list[Finding]:
    import psutil

    from trellis.data.loading import load_federation

    findings = []
    most = 0.0
    for name, each in scenario_file.expand(scenario):
        federation = load_federation(each, each.seeds[0])
        data = federation.data
        sizes = [len(part) for part in federation.parts] if federation.num_clients <= 100_000 else [0]
        data_mb = sum(t.nbytes for t in data.train.fields.values()) / 1e6
        model_mb = _model_mb(each, data.example_shape, data.num_classes, data.facts)
        workers = _workers(each)
        # Weights, gradients, momentum and what travels: four models a worker; two more in the cloud.
        need = (workers + 1) * (WORKER_BASE_MB + data_mb) + (4 * workers + 2) * model_mb
        most = max(most, need)
        label = f" ({name})" if name else ""
        findings.append(
            Finding(
                "ok",
                "data",
                f"{len(data.train)} examples, {federation.num_clients} clients with {min(sizes)} to {max(sizes)} each, "
                f"model {model_mb:.1f} MB{label}",
            )
        )
    free = psutil.virtual_memory().available / 1e6
    level: Literal["ok", "warn", "fail"] = "ok" if most < 0.7 * free else "warn" if most < free else "fail"
    findings.append(Finding(level, "memory", f"about {most / 1000:.1f} GB needed, {free / 1000:.1f} GB free"))
    return findings


def _model_mb(scenario: Scenario, shape: tuple[int, ...], num_classes: int, facts: object) -> float:
    cls, config = scenario_file.config_of(scenario, "models")
    if not shape:
        return 0.0
    model = cls(config).build(shape, num_classes, facts)
    return float(sum(t.nbytes for t in model.state_dict().values())) / 1e6


def _workers(scenario: Scenario) -> int:
    if scenario.runtime.grid == "local":
        return 1
    cohort = scenario.rounds.clients_per_round or scenario.clients or 1
    return min(scenario.runtime.workers or os.cpu_count() or 1, cohort)


def _cores(scenario: Scenario) -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    asked = _workers(scenario) * scenario.runtime.threads
    text = f"{_workers(scenario)} workers x {scenario.runtime.threads} threads on {cores} cores"
    if scenario.runtime.address:
        return [Finding("ok", "cores", f"{text}; the cluster at {scenario.runtime.address} decides")]
    if scenario.runtime.grid == "ray" and (scenario.runtime.workers or 1) > cores:
        return [Finding("fail", "cores", f"{text}: runtime.workers is more than the cores Ray would find")]
    return [Finding("warn" if asked > cores else "ok", "cores", text)]


def _gpu(scenario: Scenario) -> list[Finding]:
    import torch

    wanted = scenario.runtime.device == "cuda" or scenario.runtime.gpus_per_worker > 0
    if not torch.cuda.is_available():
        return [
            Finding("fail", "gpu", "the scenario asks for CUDA, but torch sees no device")
            if wanted
            else Finding("ok", "gpu", "none needed, none found")
        ]
    count = torch.cuda.device_count()
    share = scenario.runtime.gpus_per_worker * _workers(scenario)
    if share > count:
        return [Finding("fail", "gpu", f"{share:g} GPUs asked for by all workers together, {count} found")]
    return [Finding("ok", "gpu", f"{count} x {torch.cuda.get_device_name(0)}")]


def _disk(scenario: Scenario) -> list[Finding]:
    import shutil

    del scenario
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    findings = [Finding("ok" if free > 2 else "warn", "disk", f"{free:.0f} GB free here for runs")]
    if not os.access(tempfile.gettempdir(), os.W_OK):
        findings.append(
            Finding("fail", "disk", f"{tempfile.gettempdir()} is not writable; Ray keeps its session there")
        )
    return findings


def _address(scenario: Scenario) -> list[Finding]:
    address = scenario.runtime.address
    if scenario.runtime.grid == "local":
        return []
    if address and address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not host or not port.isdigit():
            return [Finding("fail", "ports", f"runtime.address {address!r} is not host:port")]
        try:
            socket.create_connection((host, int(port)), timeout=3).close()
        except OSError as error:
            return [Finding("fail", "ports", f"no Ray cluster answers at {address}: {error.strerror or error}")]
        return [Finding("ok", "ports", f"a server answers at {address}")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return [Finding("ok", "ports", "loopback ports can be opened")]
