"""One contract over every registered trainer and every scenario in the repository, without being told of them."""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from trellis import experiment, flower, records, registry, scenario
from trellis.grids.base import ClientGrid, Layer
from trellis.grids.local import LocalGrid
from trellis.grids.ray import RayGrid
from trellis.runs import Run
from trellis_clients import contract
from trellis_clients.app import AppFactory
from trellis_clients.site import Cell

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = sorted(ROOT.glob("scenarios/**/*.yaml"))
TRAINERS = sorted(registry.plugins("trainers"))
SMALL = ROOT / "tests" / "clients" / "contract.yaml"

FEW = ["model.width=8", "clients=12", "trainer.base_epochs=1"]
SHORTER = {
    "cema": ["strategy.foundation.width=8", "strategy.foundation.hidden=16"],
    "dine": ["trainer.predictor_epochs=3"],
    "mesa": ["clients=10"],
    "single-path-nas": ["clients=10"],
    "sltt": ["clients=16"],
    "recon-gradient": FEW,
    "recon-icarl": [*FEW, "trainer.budget=80"],
    "recon-joint": FEW,
    "recon-protonet": [*FEW, "trainer.episodes=20"],
    "visual-tuning": ["trainer.base.epochs=0", "trainer.local_epochs=1"],
}
"""What shortens scenarios with long turns or much to learn before the first; no clause depends on it."""


@cache
def cheapest(name: str) -> tuple[Path, list[str]]:
    """Return the scenario of least work, of the repository's that use a trainer and of a small one, if it can."""
    candidates: dict[str, tuple[Path, list[str]]] = {}
    for path in SCENARIOS:
        for variant, each in scenario.expand(scenario.read(path)):
            if each.trainer.name == name:
                parts = scenario.plain(each)
                own = [f"{key}={json.dumps(parts[key])}" for key in scenario.COMPONENTS.values()]
                steps = [parts["trainer"].get(key) for key in ("local_epochs", "local_steps", "method")]
                work = json.dumps([parts["data"], parts["partition"], parts["clients"], parts["model"], steps])
                candidates.setdefault(work, (path, ["variants={}", *own] if variant else []))
    facts = registry.info_of(registry.load("trainers", name)).facts
    if not candidates or ("image" in facts["takes"] and facts["sends"] == "weights" and not own_scenario(name)):
        strategy = next(iter(facts.get("strategies") or ("fedavg",)))
        candidates["small"] = SMALL, [f"trainer={name}", f"strategy={strategy}"]
    found = list(candidates.values())
    path, overrides = found[0] if len(found) == 1 else min(found, key=lambda each: work_of(*each))
    source = ["strategy.epochs=1"] if facts["sends"] == "uploads" else []
    return path, [*overrides, *source, *SHORTER.get(name, ())]


def own_scenario(name: str) -> bool:
    return (ROOT / "scenarios" / "trainers" / f"{name}.yaml").is_file()


def work_of(path: Path, overrides: list[str]) -> int:
    """Return about how much one turn of client 0 computes: weights times the examples it sees."""
    site = contract.site_of(path, overrides)
    config = site.trainer.config
    passes = getattr(config, "local_epochs", getattr(config, "local_steps", 1))
    weights = sum(parameter.numel() for parameter in site.model.parameters())
    return int(passes * weights * max(len(site.federation.client(0).train), 1))


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


@cache
def data_by_kind() -> dict[str, str]:
    """Return a data set of every kind, one that needs no parameters."""
    found: dict[str, str] = {}
    for name, plugin in registry.plugins("datasets").items():
        cls = plugin.load()
        required = any(field.is_required() for field in cls.Config.model_fields.values())
        kind = registry.info_of(cls).facts.get("kind")
        if kind is not None and not required:
            found.setdefault(kind, name)
    return found


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_refuses_data_of_the_wrong_kind(name):
    takes = registry.info_of(registry.load("trainers", name)).facts["takes"]
    wrong = {kind: data for kind, data in data_by_kind().items() if kind not in takes}
    assert len(wrong) >= 4
    path, overrides = cheapest(name)
    for kind, data in wrong.items():
        with pytest.raises(experiment.TrellisError, match=f"are '{kind}'"):
            scenario.load(path, [*overrides, f"data={data}"])


# -- one process and Ray ----------------------------------------------------------------------------------------------


class Part(Layer):
    """The first clients of a grid. Notes the names of the records that they reply."""

    def __init__(self, inner: ClientGrid, num_clients: int) -> None:
        super().__init__(inner)
        self.num_clients = num_clients
        self.replied: set[str] = set()

    def get_node_ids(self):
        return list(self.inner.get_node_ids())[: self.num_clients]

    def stream(self, messages, *, timeout=None):
        for reply in super().stream(messages, timeout=timeout):
            if not reply.has_error():
                self.replied |= records.array_records(reply.content).keys()
            yield reply


@cache
def shortest(name: str) -> scenario.Scenario:
    """Return two rounds of two clients each of a trainer's cheapest scenario, as the only variant, of its name."""
    path, overrides = cheapest(name)
    evaluation = ["evaluation.central_every=0", "evaluation.federated_every=0", "probe.every=0", "probe.least=0"]
    cut = ["rounds.count=2", "rounds.clients_per_round=2", "seeds=[0]", "runtime.grid=local", *evaluation]
    each = scenario.expand(scenario.load(path, [*overrides, *cut]))[0][1]
    return each.model_copy(update={"variants": {name: {}}})


@pytest.fixture(scope="module")
def worker(ray_session):
    """One Ray worker that can be any client of any trainer's shortest scenario, started once for all of them."""
    cells = {}
    for name in TRAINERS:
        ((_, each),) = scenario.expand(shortest(name))
        cells[f"{name}-seed0"] = Cell(scenario.plain(each), 0)
    with RayGrid(AppFactory(cells), 64, workers=1) as grid:
        yield grid


def final(name: str, folder: Path, grid: ClientGrid | None = None) -> tuple[str, set[str]]:
    """Run a trainer's shortest scenario; return its weights' SHA-256, and names of records that clients replied."""
    parts: list[Part] = []

    @contextmanager
    def grids(client, cells):
        sites = client.Sites(cells)

        def grid_for(each, num_clients, _):
            inner = grid or LocalGrid(client.make_app(sites=sites), num_clients)
            inner.forget()
            parts.append(Part(inner, num_clients))
            return parts[-1], sites

        yield grid_for

    flower.quiet()
    outcome = experiment.execute(Run.create(folder, shortest(name)), grids=grids)
    assert not outcome.failed, outcome.failed
    return outcome.summaries[0]["sha256"], parts[0].replied


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_runs_alike_in_one_process_and_on_ray(name, worker, tmp_path):
    """To the same bits; and what its clients reply in a run, answers to questions too, is what it declares."""
    local, replied = final(name, tmp_path)
    assert (local, replied) == final(name, tmp_path, worker)
    declared = registry.info_of(registry.load("trainers", name)).facts.get("replies", ())
    assert replied <= {records.ARRAYS, *declared}


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
        (
            "    def optimizer(self, model, turn):\n        import torch\n"
            "        return torch.optim.SGD(model.parameters(), lr=1e-4)",
            "loss did not fall by 1%",
        ),
        (
            "    def fit(self, model, data, state, turn):\n"
            "        turn.reply['images'] = {'x': data.train.fields['x'][data.train.rows]}\n"
            "        return super().fit(model, data, state, turn)",
            "sends the record 'images'",
        ),
        (
            "    def fit(self, model, data, state, turn):\n        import torch\n"
            "        turn.reply['said'] = {'x': torch.tensor([float('nan')])}\n"
            "        return super().fit(model, data, state, turn)",
            "'x' of record 'said' is not finite",
        ),
        (
            "    def fit(self, model, data, state, turn):\n        m = super().fit(model, data, state, turn)\n"
            "        self.seen = {**getattr(self, 'seen', {}), turn.client: turn.round}\n"
            "        if len(self.seen) > 1:\n            next(model.parameters()).data += 1\n        return m",
            "after saving and loading",
        ),
    ],
    ids=[
        "does not learn",
        "no loss",
        "nan",
        "unseeded",
        "leaks between turns",
        "hardly learns",
        "leaks data",
        "replies nan",
        "keeps clients apart by itself",
    ],
)
def test_the_contract_catches(tmp_path, body, clause):
    (tmp_path / "mine.py").write_text(
        "from trellis.registry import register\nfrom trellis_clients.trainer import Trainer, TrainerConfig\n"
        "@register('trainers', 'mine', takes=('image',), sends='weights', replies=('said',))\nclass Mine(Trainer):\n"
        f"    class Config(TrainerConfig): pass\n{body}\n"
    )
    text = (Path(__file__).parent / "contract.yaml").read_text().replace("name: sgd", "name: mine.py:Mine")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(contract.ContractError, match=clause):
        contract.check(tmp_path / "mine.yaml")
