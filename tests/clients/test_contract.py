"""One contract over every registered trainer and every scenario in the repository, without being told of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trellis import experiment, flower, registry, scenario
from trellis.runs import Run
from trellis_clients import contract

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = sorted(ROOT.glob("scenarios/**/*.yaml"))
TRAINERS = sorted(registry.plugins("trainers"))


def cheapest(name: str) -> tuple[Path, list[str]]:
    """Return a scenario of the repository that uses a trainer, else a small one that can."""
    for path in SCENARIOS:
        for variant, each in scenario.expand(scenario.read(path)):
            if each.trainer.name == name:
                parts = scenario.plain(each)
                own = [f"{key}={json.dumps(parts[key])}" for key in scenario.COMPONENTS.values()]
                return path, ["variants={}", *own] if variant else []
    info = registry.info_of(registry.load("trainers", name))
    strategy = next(iter(info.facts.get("strategies") or ("fedavg",)))
    overrides = [f"trainer={name}", f"strategy={strategy}"]
    return ROOT / "tests" / "clients" / "contract.yaml", overrides


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_keeps_the_contract(name):
    path, overrides = cheapest(name)
    contract.check(path, overrides)


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_says_what_it_is(name):
    cls = registry.load("trainers", name)
    info = registry.info_of(cls)
    assert info.summary
    assert info.paper, "which paper?"
    assert info.facts["takes"]
    assert info.facts["sends"]
    assert cls.Config.model_json_schema()["properties"]


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_refuses_data_of_the_wrong_kind(name):
    takes = registry.info_of(registry.load("trainers", name)).facts["takes"]
    if "none" in takes:
        pytest.skip("takes no data at all")
    path, overrides = cheapest(name)
    with pytest.raises(experiment.TrellisError, match="'none'"):
        scenario.load(path, [*overrides, "data=none"])


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_scenario_runs_its_first_round(path, tmp_path):
    """Shortened to one round and one seed of the first variant, in this process."""
    flower.quiet()
    shortened = ["rounds.count=1", "seeds=[0]", "runtime.grid=local", "probe.every=0"]
    loaded = scenario.load(path, shortened)
    first = scenario.expand(loaded)[0][1].model_copy(update={"variants": {}})
    outcome = experiment.execute(Run.create(tmp_path, first))
    assert not outcome.failed, outcome.failed
    assert outcome.summaries[0]["rounds"] >= 1


@pytest.mark.parametrize(
    ("body", "clause"),
    [
        ("    def loss(self, model, batch, turn): return super().loss(model, batch, turn) * 0", "loss did not fall"),
        ("    def fit(self, *a): return {'accuracy': 1.0}", "no 'loss'"),
        ("    def fit(self, *a): return {'loss': float('nan')}", "not finite"),
        (
            "    def batches(self, split, turn):\n        import torch\n        torch.seed()\n"
            "        yield split.batch(torch.randperm(len(split))[:4])",
            "other bits",
        ),
        (
            "    def fit(self, model, data, state, turn):\n        m = super().fit(model, data, state, turn)\n"
            "        self.n = getattr(self, 'n', 0) + 1\n"
            "        next(model.parameters()).data += self.n\n        return m",
            "other bits",
        ),
    ],
    ids=["does not learn", "no loss", "nan", "unseeded", "leaks between turns"],
)
def test_the_contract_catches(tmp_path, body, clause):
    (tmp_path / "mine.py").write_text(
        "from trellis.registry import register\nfrom trellis_clients.trainer import Trainer, TrainerConfig\n"
        "@register('trainers', 'mine', takes=('image',), sends='weights')\nclass Mine(Trainer):\n"
        f"    class Config(TrainerConfig): pass\n{body}\n"
    )
    text = (Path(__file__).parent / "contract.yaml").read_text().replace("name: sgd", "name: mine.py:Mine")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(contract.ContractError, match=clause):
        contract.check(tmp_path / "mine.yaml")
