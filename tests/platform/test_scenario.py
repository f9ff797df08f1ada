"""Scenario files: what is read, what is refused, and in which words."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trellis import scenario
from trellis.errors import TrellisError

GOOD = "name: demo\ndata: digits\nclients: 4\ntrainer: {name: sgd, lr: 0.1}\n"


@pytest.fixture
def write(tmp_path):
    def to_file(text: str) -> Path:
        path = tmp_path / "s.yaml"
        path.write_text(text)
        return path

    return to_file


def test_a_bare_name_is_a_component(write):
    assert scenario.load(write(GOOD)).data == scenario.Component(name="digits")


def test_dump_and_read_give_the_same_scenario(write):
    loaded = scenario.load(write(GOOD + "variants: {a: {}, b: {strategy: fedavgm}}\nseeds: [3, 4]\n"))
    assert scenario.read(write(scenario.dump(loaded))) == loaded


BAD = {
    "unknown key": ("rouns: {count: 3}\n", "scenario-invalid", "unknown key 'rouns'. Did you mean 'rounds'?"),
    "unknown inner key": ("rounds: {cuont: 3}\n", "scenario-invalid", "'rounds.cuont'. Did you mean 'count'?"),
    "wrong type": ("rounds: {count: many}\n", "scenario-invalid", "rounds.count"),
    "number as text": ("rounds: {count: '3'}\n", "scenario-invalid", "rounds.count"),
    "NaN": ("rounds: {quorum: .nan}\n", "scenario-invalid", "rounds.quorum"),
    "zero rounds": ("rounds: {count: 0}\n", "scenario-invalid", "rounds.count"),
    "too large a cohort": ("rounds: {clients_per_round: 5}\n", "scenario-invalid", "5, but there are only 4 clients"),
    "unknown strategy": ("strategy: fedavgg\n", "plugin-unknown", "Did you mean 'fedavg'?"),
    "unknown parameter": ("strategy: {name: fedavgm, server_momentun: 0.9}\n", "scenario-invalid", "server_momentum"),
    "tag": ("description: !!python/object/apply:os.system ['true']\n", "scenario-yaml", "python"),
    "key twice": ("clients: 5\n", "scenario-yaml", "'clients' stands twice"),
    "seed twice": ("seeds: [1, 1]\n", "scenario-invalid", "a seed stands twice"),
    "negative seed": ("seeds: [-1]\n", "scenario-invalid", "seeds.0"),
    "scaffold alone": ("strategy: scaffold\n", "scenario-pairing", "sends weights"),
    "bad variant": ("variants: {a: {seeds: [1]}}\n", "scenario-variant", "variants.a"),
    "bad variant key": ("variants: {a: {roundz: {}}}\n", "scenario-invalid", "'roundz'. Did you mean 'rounds'?"),
    "missing trainer file": ("model: mine.py:Mine\n", "plugin-file", "does not exist"),
}


@pytest.mark.parametrize(("text", "code", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_that_names_the_key(write, text, code, words):
    with pytest.raises(TrellisError) as caught:
        scenario.load(write(GOOD + text))
    assert caught.value.code == code
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_trainer_parameter_names_its_key(write):
    with pytest.raises(TrellisError, match=r"trainer\.lrr.*Did you mean 'lr'"):
        scenario.load(write(GOOD.replace("lr:", "lrr:")))


def test_nan_learning_rate_is_refused(write):
    with pytest.raises(TrellisError, match=r"trainer\.lr"):
        scenario.load(write(GOOD.replace("0.1", ".nan")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x]\nb: [" + ", ".join(["*a"] * 200) + "]", "aliases"),
        ("a: " + "[" * 60 + "]" * 60, "levels"),
        ("[" * 5000, "YAML"),
        ("x" * 2_000_000, "at most"),
        ("{1: 2}", "not text"),
        ("- a list", "expected keys"),
        ("a: b: c", "YAML"),
    ],
)
def test_hostile_yaml_is_refused(write, text, words):
    with pytest.raises(TrellisError, match=words):
        scenario.read(write(text))


def test_missing_file():
    with pytest.raises(TrellisError, match="no scenario file at"):
        scenario.load(Path("nowhere.yaml"))


def test_overrides(write):
    loaded = scenario.load(write(GOOD), ["trainer.lr=0.5", "rounds.count=3", "seeds=[1, 2]", "strategy=fedavgm"])
    assert loaded.trainer.params["lr"] == 0.5
    assert (loaded.rounds.count, loaded.seeds, loaded.strategy.name) == (3, (1, 2), "fedavgm")


def test_overriding_a_name_drops_the_old_parameters(write):
    assert scenario.load(write(GOOD), ["trainer.name=fedprox"]).trainer.params == {}


@pytest.mark.parametrize("text", ["trainer.lr", "=3", "trainer..lr=3", "clients.x=3"])
def test_bad_overrides(write, text):
    with pytest.raises(TrellisError, match="--set"):
        scenario.load(write(GOOD), [text])


def test_scientific_notation_is_a_number(write):
    assert scenario.load(write(GOOD.replace("0.1", "1e-3"))).trainer.params["lr"] == 1e-3


def test_variants_merge_components(write):
    text = GOOD + "variants:\n  same: {trainer: {momentum: 0.9}}\n  other: {trainer: fedprox}\n"
    variants = dict(scenario.expand(scenario.load(write(text))))
    assert variants["same"].trainer.params == {"lr": 0.1, "momentum": 0.9}
    assert variants["other"].trainer == scenario.Component(name="fedprox")


def test_kind_of_data_and_trainer_must_fit(write):
    with pytest.raises(TrellisError, match="'none'"):
        scenario.load(write(GOOD.replace("data: digits", "data: none")))


def test_schema_accepts_what_is_read(write):
    import jsonschema

    jsonschema.validate(yaml.safe_load(scenario.dump(scenario.load(write(GOOD)))), scenario.schema())


@given(st.dictionaries(st.text(string.ascii_letters, min_size=1, max_size=8), st.integers() | st.text(), max_size=4))
def test_random_keys_never_escape_as_another_exception(raw):
    try:
        scenario.from_mapping({"name": "x", "data": "digits", **raw})
    except TrellisError as error:
        assert "\n" not in str(error)
