"""The command line as a person uses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from federations import DIGITS, write
from trellis import cli, describe, examples, registry, scenario


def call(*words: str) -> tuple[int, str]:
    """Run a command as ``main`` does, in this process: exit status and everything printed."""
    result = CliRunner().invoke(cli.app, list(words), standalone_mode=True)
    if isinstance(result.exception, cli.TrellisError):
        return result.exception.exit_status, f"error: {result.exception}"
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli, "out", cli.Console(highlight=False, soft_wrap=True, width=200))


def test_run_list_compare_report(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(write(tmp_path, DIGITS))
    assert call("validate", path) == (0, f"{path}: valid. 1 cell of 4 rounds.\n")
    status, text = call("run", path, "--set", "rounds.count=2")
    assert status == 0, text
    assert "round 2/2" in text
    assert "report.html" in text
    status, text = call("run", path, "--set", "rounds.count=2", "--set", "trainer.lr=0.01", "--json")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line.get("round") for line in lines] == [0, 1, 2, None]
    status, text = call("run", path, "--set", "rounds.count=1", "--quiet")
    assert text.strip().endswith("report.html")
    assert len(text.strip().splitlines()) == 1

    status, text = call("runs")
    assert text.count("complete") == 3
    names = [line.split()[0] for line in text.splitlines() if line.startswith("digits/")]
    status, text = call("compare", *names[:2])
    assert status == 0, text
    assert "trainer.lr" in text
    assert (tmp_path / "compare.html").is_file()
    status, text = call("report", names[0])
    assert (status, text.strip()) == (0, str(tmp_path.relative_to(tmp_path) / f"runs/{names[0]}/report.html"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "give either a scenario file or --resume"),
        (["run", "nowhere.yaml"], "no scenario file at nowhere.yaml"),
        (["run", "--resume", "nothing"], "no run 'nothing'"),
        (["report", "nothing"], "no run 'nothing'"),
        (["list", "trainerz"], "Did you mean 'trainers'?"),
        (["info", "trainers", "fedprx"], "Did you mean 'fedprox'?"),
        (["new", "trainer", "Bad Name"], "use small letters"),
        (["compare", "one"], "at least two"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    status, text = call(*words)
    assert status == 2
    assert message in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("group", registry.GROUPS)
def test_lists_hold_every_name_whole_in_any_terminal(monkeypatch, group, width):
    """And cut nothing off beside them."""
    monkeypatch.setattr(cli, "out", cli.Console(highlight=False, soft_wrap=True, width=width))
    status, text = call("list", group)
    assert status == 0
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    begun = {line.split()[0] for line in text.splitlines()[1:] if not line.startswith(" ")}
    assert begun == registry.plugins(group).keys()
    for name, plugin in registry.plugins(group).items():
        summary = registry.info_of(plugin.load()).summary
        assert summary.replace(" ", "") in "".join(text.split()), name


def test_a_list_says_what_crosses_the_wire():
    _, text = call("list", "trainers")
    entry = text.partition("\nscaffold ")[2].partition("\nsgd ")[0]
    assert "takes image, vector, tokens, series, points; sends weights, control variates" in entry
    _, text = call("info", "trainer", "scaffold")
    assert "sends: weights, control variates\n" in text
    assert "records beside the weights: control\n" in text


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of a table of parameters by their first."""
    lines = text.partition("\nparameter ")[2].partition("\n\n")[0].splitlines()[1:]
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    return {first: rest for first, *rest in cells}


def test_info_expands_nested_parameters_and_says_which_are_required():
    _, text = call("info", "partitioner", "size")
    assert rows(text)["sizes"] == ["required", "list of integer; examples of each client"]
    assert "\n  sizes: ...\n" in text
    _, text = call("info", "trainer", "visual-tuning")
    found = rows(text)
    assert found["base.epochs"][0] == "30"
    assert found["base.sent"][0] == "false"
    assert "base" not in found
    _, text = call("info", "strategy", "ccvr")
    found = rows(text)
    assert found["noise"] == ["null", "keys | null; differential privacy of the statistics"]
    assert {name.partition(".")[0] for name in found if "." in name} == {"base", "noise"}


@pytest.mark.parametrize("group", registry.GROUPS)
def test_info_leaves_no_type_blank(group):
    for name, plugin in registry.plugins(group).items():
        for parameter in describe.parameters(plugin.load().Config):
            assert parameter.kind, (name, parameter)
            assert "?" not in parameter.kind


def test_an_example_has_data_that_its_trainer_takes(monkeypatch):
    monkeypatch.setattr(examples, "files", lambda: ())
    monkeypatch.setattr(examples, "folder", lambda: Path("/nowhere"))
    for name in registry.plugins("trainers"):
        facts = registry.info_of(registry.load("trainers", name)).facts
        if facts["sends"] != "weights":
            continue  # their strategies need parameters
        text, path = examples.of_trainer(name)
        assert path is None
        scenario.check(scenario.from_mapping(scenario.safe_yaml.parse(text, "")))


def test_lists_and_info():
    status, text = call("list", "trainers")
    assert status == 0
    assert all(name in text for name in ("sgd", "fedprox", "scaffold"))
    assert "does not load" not in text
    status, text = call("list", "strategies")
    assert "fedadam" in text
    status, text = call("info", "trainer", "fedprox")
    assert "mu" in text
    assert "name: fedprox" in text
    assert "trainer" in text.partition("A scenario that runs it")[2]
    status, text = call("schema")
    assert json.loads(text)["title"] == "Scenario"


def test_doctor_says_what_does_not_fit(tmp_path):
    path = str(write(tmp_path, DIGITS))
    status, text = call("doctor", path)
    assert status == 0, text
    for subject in ("packages", "data", "memory", "cores", "gpu", "disk"):
        assert subject in text
    status, text = call("doctor", path, "--set", "runtime.grid=ray", "--set", "runtime.workers=4096")
    assert status == 1
    assert "more than the cores" in text
    status, text = call("doctor", path, "--set", "runtime.grid=ray", "--set", "runtime.address=127.0.0.1:1")
    assert status == 1
    assert "no Ray cluster answers at 127.0.0.1:1" in text
    status, text = call("doctor", path, "--set", "clients=1000", "--set", "partition.alpha=0.01")
    assert status == 1
    assert "client" in text


def test_a_new_trainer_works_and_its_test_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = call("new", "trainer", "my-method")
    assert status == 0, text
    assert (tmp_path / "my_method.py").is_file()
    status, text = call("run", "my_method.yaml", "--quiet")
    assert status == 0, text
    assert pytest.main(["-q", "-p", "no:cacheprovider", "-c", "/dev/null", str(tmp_path / "test_my_method.py")]) == 0
    status, text = call("info", "trainer", "my_method.py:MyMethod")
    assert status == 0, text
    example = scenario.safe_yaml.parse(text.partition("A scenario that runs it:")[2], "")
    scenario.check(scenario.from_mapping(example))
    status, text = call("new", "trainer", "my-method")
    assert status == 2
    assert "is there already" in text


def test_an_error_shows_no_traceback_unless_asked(tmp_path):
    import subprocess
    import sys

    command = [sys.executable, "-c", "from trellis.cli import main; main()"]
    quiet = subprocess.run([*command, "run", "nowhere.yaml"], capture_output=True, text=True, check=False)
    assert (quiet.returncode, quiet.stdout) == (2, "")
    assert quiet.stderr == "error: no scenario file at nowhere.yaml [scenario-missing]\n"
    loud = subprocess.run([*command, "--traceback", "run", "nowhere.yaml"], capture_output=True, text=True, check=False)
    assert "Traceback" in loud.stderr
    assert loud.returncode != 0
