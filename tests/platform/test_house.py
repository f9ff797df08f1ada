"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from trellis import registry
from trellis.errors import PluginError

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)


def test_the_standard_librarys_platform_is_not_shadowed():
    result = run(sys.executable, "-c", "import platform; print(platform.__file__); platform.python_version()")
    assert result.returncode == 0, result.stderr
    assert str(ROOT) not in result.stdout.replace(str(ROOT / ".venv"), "")
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not list((ROOT / "platform").glob("*.py"))


def test_the_edge_extra_names_neither_torch_nor_flower():
    wanted = {extra: set() for extra in ("", "edge", "train")}
    for text in importlib.metadata.requires("trellis") or []:
        requirement = Requirement(text)
        for extra, names in wanted.items():
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                names.add(requirement.name)
    heavy = {"torch", "flwr", "ray", "flwr-datasets", "scikit-learn"}
    assert not heavy & (wanted[""] | wanted["edge"])
    assert "onnxruntime" in wanted["edge"]
    assert heavy <= wanted["train"]


def test_without_torch_an_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("trellis.data.sets.digits")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(PluginError, match=r"pip install '\.\[train\]' in a checkout"):
        registry.load("datasets", "digits")


def test_help_imports_no_heavy_library():
    code = (
        "import sys; sys.argv = ['trellis', '--help']\n"
        "from trellis.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'ray', 'flwr', 'sklearn', 'pandas'} & sys.modules.keys()))"
    )
    result = run(sys.executable, "-c", code)
    assert "HEAVY []" in result.stdout, result.stdout + result.stderr
    assert "validate" in result.stdout


def test_imports_flow_one_way():
    result = run(str(Path(sys.executable).parent / "lint-imports"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 kept, 0 broken" in result.stdout


def test_nothing_reads_pickles():
    """No file of the project loads a pickle, from wherever; Ray's own transport between our processes apart."""
    forbidden = (
        "pickle.load",
        "torch.load(",
        "joblib.load",
        "yaml.load(",
        "yaml.unsafe",
        "marshal.load",
        "allow_pickle=True",
    )
    for source in ("platform", "clients", "server"):
        for path in (ROOT / source).rglob("*.py"):
            text = path.read_text()
            assert not [word for word in forbidden if word in text], path


def test_every_error_code_is_documented():
    family = {"TrellisError", "ScenarioError", "PluginError", "DataError", "GridError", "RoundError", "RunError"}
    page = (ROOT / "docs" / "errors.md").read_text()
    missing = {}
    for source in ("platform", "clients", "server"):
        for path in (ROOT / source).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
                    continue
                code = node.args[0].value
                if isinstance(node.func, ast.Name) and node.func.id in family and f"`{code}`" not in page:
                    missing[code] = path.name
    assert not missing


def test_every_check_of_the_gate_is_documented():
    from trellis.grids._checks import CHECKS
    from trellis.grids._cohort import COHORT_CHECKS

    page = (ROOT / "docs" / "errors.md").read_text()
    assert not [code for code in [*CHECKS, *COHORT_CHECKS] if f"`{code}`" not in page]


def test_every_key_of_a_scenario_is_documented():
    from trellis.scenario import schema

    page = (ROOT / "docs" / "scenario.md").read_text()
    keys = set(schema()["properties"]) - {"base"}
    for model in schema()["$defs"].values():
        keys |= set(model.get("properties", {}))
    assert not [key for key in sorted(keys) if f"`{key}`" not in page]
