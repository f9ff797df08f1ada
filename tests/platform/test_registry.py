"""Plug-ins by bundled name, by a third party's entry point, by file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trellis import examples, registry, scenario
from trellis.errors import PluginError

TRAINER = """\
from trellis.registry import register
from trellis_clients.trainer import Trainer, TrainerConfig

@register("trainers", "{name}", paper="", takes=("image",), sends="weights")
class Mine(Trainer):
    "Mine, from another package."
    class Config(TrainerConfig):
        pass
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a package with entry points, as pip would: its metadata beside its module."""

    def install(name: str, entry: str, code: str, group: str = "trainers") -> None:
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[trellis.{group}]\n{entry}\n")
        registry.plugins.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    registry.plugins.cache_clear()


def test_a_third_partys_trainer_is_found_by_its_entry_point(installed):
    installed("their_package", "theirs = their_package:Mine", TRAINER.format(name="theirs"))
    cls = registry.load("trainers", "theirs")
    assert registry.info_of(cls).summary == "Mine, from another package."
    assert "sgd" in registry.plugins("trainers")


def test_two_packages_cannot_offer_one_name(installed):
    installed("copycat", "sgd = copycat:Mine", TRAINER.format(name="sgd"))
    with pytest.raises(PluginError, match=r"two trainers are named 'sgd'.*copycat:Mine"):
        registry.plugins("trainers")


def test_a_third_partys_broken_trainer_says_so_and_stops_no_other(installed):
    installed("broken_package", "broken = broken_package:Mine", "raise RuntimeError('no licence')")
    with pytest.raises(PluginError, match=r"broken_package:Mine.*RuntimeError: no licence"):
        registry.load("trainers", "broken")
    assert registry.load("trainers", "sgd")


def test_listing_names_imports_no_plug_in():
    code = (
        "import sys\nfrom trellis import registry\n"
        "names = [n for g in ('datasets', 'partitioners', 'models', 'trainers') for n in registry.plugins(g)]\n"
        "assert {'digits', 'dirichlet', 'small-cnn', 'scaffold'} <= set(names), names\n"
        "print('HEAVY', sorted({'torch', 'sklearn', 'flwr_datasets', 'ray'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.stdout.strip() == "HEAVY []", result.stdout + result.stderr


def test_a_file_is_imported_once_and_anew_when_it_changes(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(TRAINER.format(name="a"))
    first = registry.load("trainers", "mine.py:Mine", base=tmp_path)
    assert registry.load("trainers", "mine.py:Mine", base=tmp_path) is first
    path.write_text(TRAINER.format(name="b"))
    assert registry.info_of(registry.load("trainers", "mine.py:Mine", base=tmp_path)).name == "b"


def test_every_bundled_file_declares_its_own_name():
    for group in registry.GROUPS:
        for name, plugin in registry.plugins(group).items():
            info = registry.info_of(plugin.load())
            assert (info.group, info.name) == (group, name)
            assert info.summary, name


def test_the_name_of_a_group_must_be_one():
    with pytest.raises(PluginError, match="Did you mean 'trainers'"):
        registry.plugins("trainer")


def test_private_files_of_a_family_offer_nothing():
    root = Path(__file__).resolve().parents[2] / "clients" / "trellis_clients" / "trainers"
    private = {path.stem for path in root.rglob("_*.py")}
    assert not {name for name in registry.plugins("trainers") if f"_{name}" in private}


@pytest.mark.parametrize("name", sorted(registry.plugins("trainers")))
def test_every_trainer_has_a_scenario_that_can_run(name, tmp_path):
    text, path = examples.of_trainer(name)
    if path is None:
        path = tmp_path / "example.yaml"
        path.write_text(text)
    loaded = scenario.load(path)
    assert name in {each.trainer.name for _, each in scenario.expand(loaded)}


def test_a_bundled_trainer_knows_its_family():
    assert registry.plugins("trainers")["cutmix"].family == "augmentation"
    assert registry.plugins("strategies")["fedavg"].family == ""
