"""A federation small enough to compute by hand: numpy clients, every registered strategy, and a bare round loop."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import Strategy

from trellis import flower, records, registry, seeding
from trellis.grids.local import LocalGrid
from trellis.scenario import Scenario, from_mapping
from trellis_server import folding
from trellis_server.strategies import build_strategy

Weights = dict[str, np.ndarray[Any, Any]]

CLIENTS = 8
MODS = {"fixedclipping": fixedclipping_mod, "adaptiveclipping": adaptiveclipping_mod}
NEEDED: Mapping[str, dict[str, Any]] = {
    "qfedavg": {"client_learning_rate": 0.1},
    "dp-server-fixed": {"noise_multiplier": 0.5, "clipping_norm": 0.2},
    "dp-client-fixed": {"noise_multiplier": 0.5, "clipping_norm": 0.2},
    # Below a tenth of the cohort, or the default noise on the count of clipped updates uses it all up.
    "dp-server-adaptive": {"noise_multiplier": 0.3},
    "dp-client-adaptive": {"noise_multiplier": 0.3},
}
"""Parameters without which Flower does not build a strategy."""

PLAYED = ("weights", "trees", "scaffold")
"""What the clients here can answer with. A strategy that merges something else is tested with its own trainer."""


def facts(name: str) -> Mapping[str, Any]:
    return registry.info_of(registry.load("strategies", name)).facts


STRATEGIES = sorted(name for name in registry.plugins("strategies") if facts(name).get("merges") in PLAYED)


def scenario_for(name: str, *, cohort: int | None = None, evaluators: int | None = None, **params: Any) -> Scenario:
    return from_mapping(
        {
            "name": "tiny",
            "data": "none",
            "clients": CLIENTS,
            "strategy": {"name": name, **NEEDED.get(name, {}), **params},
            "rounds": {"clients_per_round": cohort},
            "evaluation": {"clients": evaluators},
        }
    )


def build(name: str, seed: int = 0, **options: Any) -> Strategy:
    return build_strategy(scenario_for(name, **options), CLIENTS, seed)


def initial(name: str) -> ArrayRecord:
    if facts(name)["merges"] == "trees":
        return records.array_record({"0": np.zeros(0, np.uint8)})
    generator = np.random.default_rng(7)
    return records.array_record(
        {"w": generator.normal(size=(5, 3)).astype(np.float32), "b": generator.normal(size=3).astype(np.float32)}
    )


def train(client: int, round_: int, weights: Weights) -> Weights:
    """Step towards a target of the client's own, by a rate that changes with the round."""
    return {
        name: values + np.float32(0.5 / round_) * (np.float32(client / 4 - 1) - values)
        for name, values in weights.items()
    }


def scaffolded(sent: Any, own: Any, control: Any) -> tuple[Any, Any]:
    """Return a client's ``w`` moved by the control, and the change of a control of its own that starts at zero."""
    return own - np.float32(0.1) * control, sent - own - control


def examples(client: int) -> int:
    return 10 + 7 * client


def make_app(name: str = "fedavg") -> ClientApp:
    """Return clients that answer with what the strategy merges: weights, weights and a control, or trees."""
    app = ClientApp(mods=[MODS[mod] for mod in facts(name).get("client_mods", ())])
    merges = facts(name)["merges"]

    @app.train()
    def train_(message: Message, context: Context) -> Message:
        client, content = int(context.node_config["partition-id"]), message.content
        round_ = int(content["config"]["server-round"])
        sent = {k: records.view(a) for k, a in content["arrays"].items()}
        reply = RecordDict({"metrics": MetricRecord({"num-examples": examples(client), "loss": 1.0 + client})})
        if merges == "trees":
            reply["arrays"] = records.array_record({"0": with_a_tree(sent["0"].tobytes(), client, name)})
        else:
            own = train(client, round_, sent)
            if merges == "scaffold":
                control = records.view(content["control"]["w"])
                own["w"], change = scaffolded(sent["w"], own["w"], control)
                reply["control"] = records.array_record({"w": change})
            reply["arrays"] = records.array_record(own)
        reply["trellis.timing"] = ConfigRecord({"seconds": 0.1, "cpu_seconds": 0.1})
        return Message(reply, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": examples(client), "accuracy": client / 10})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def with_a_tree(booster: bytes, client: int, name: str) -> np.ndarray[Any, Any]:
    """Return a booster in XGBoost's JSON: the client's one new tree (bagging), or the old ones and it (cyclic)."""
    old = json.loads(booster)["learner"]["gradient_booster"]["model"]["trees"] if booster else []
    trees = [*(old if name == "fedxgbcyclic" else []), {"id": 0, "base_weights": [client]}]
    model = {
        "gbtree_model_param": {"num_trees": str(len(trees)), "num_parallel_tree": "1"},
        "iteration_indptr": list(range(len(trees) + 1)),
        "trees": trees,
        "tree_info": [0] * len(trees),
    }
    text = json.dumps({"learner": {"gradient_booster": {"model": model}}})
    return np.frombuffer(text.encode(), np.uint8)


class Rounds:
    """Rounds as the project's loop runs them, without screening, figures or checkpoints."""

    def __init__(self, strategy: Strategy, name: str = "fedavg", seed: int = 0, fold: bool = True) -> None:
        self.strategy, self.seed = strategy, seed
        self.fold = fold and folding.folds(strategy)
        self.grid = LocalGrid(make_app(name), CLIENTS)
        self.cohorts: list[list[int]] = []
        self.evaluators: list[int] = []
        self.metrics: list[MetricRecord | None] = []

    def run(self, arrays: ArrayRecord, rounds: Iterable[int]) -> ArrayRecord:
        for number in rounds:
            with seeding.scoped(self.seed, "configure", number):
                messages = list(self.strategy.configure_train(number, arrays, ConfigRecord(), self.grid))
            self.cohorts.append([flower.client_of(m.metadata.dst_node_id) for m in messages])
            stream = self.grid.stream(messages)
            replies = folding.folded(self.strategy, stream) if self.fold else list(stream)
            with seeding.scoped(self.seed, "aggregate", number):
                merged, metrics = self.strategy.aggregate_train(number, replies)
            self.metrics.append(metrics)
            arrays = arrays if merged is None else records.live(merged, like=arrays)
            with seeding.scoped(self.seed, "evaluate", number):
                asked = list(self.strategy.configure_evaluate(number, arrays, ConfigRecord(), self.grid))
                self.strategy.aggregate_evaluate(number, list(self.grid.stream(asked)))
            self.evaluators.append(len(asked))
        return arrays
