"""Every registered strategy: its parameters, its cohort, and two rounds of it."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from pathlib import Path

import flwr.serverapp.strategy as flower_strategies
import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg, FedAvgM, FedXgbCyclic

import tiny_federation as tiny
from trellis import records, registry
from trellis.errors import PluginError, RoundError, ScenarioError
from trellis.scenario import Component, config_of
from trellis_server.strategies import build_strategy
from trellis_server.strategies.scaffold import Scaffold


def error_of(name: str, **params: object) -> str:
    with pytest.raises(ScenarioError) as caught:
        config_of(tiny.scenario_for(name, **params), "strategies")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- names and declarations ---------------------------------------------------------------------------


def test_all_of_flower_is_offered() -> None:
    concrete = [
        cls
        for cls in vars(flower_strategies).values()
        if inspect.isclass(cls) and issubclass(cls, flower_strategies.Strategy) and not inspect.isabstract(cls)
    ]
    offered = {getattr(registry.load("strategies", name), "strategy_class", None) for name in tiny.STRATEGIES}
    assert len(concrete) >= 17
    assert set(concrete) <= offered


def test_names_are_those_a_user_would_type() -> None:
    assert {
        *("fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "fedmedian", "fedprox", "fedtrimmedavg", "krum"),
        *("multikrum", "bulyan", "qfedavg", "fedxgbbagging", "fedxgbcyclic", "scaffold"),
        *("dp-server-fixed", "dp-client-fixed", "dp-server-adaptive", "dp-client-adaptive"),
    } <= set(tiny.STRATEGIES)


@pytest.mark.parametrize("name", tiny.STRATEGIES)
def test_declaration(name: str) -> None:
    info = registry.info_of(registry.load("strategies", name))
    assert info.name == name
    assert info.summary
    assert info.facts["merges"] in {"weights", "trees", "scaffold"}
    assert set(info.facts.get("client_mods", ())) <= set(tiny.MODS)
    assert info.paper.startswith("https://") or info.facts["merges"] == "trees"


def test_the_package_is_light_to_import() -> None:
    code = "import sys, trellis_server.strategies; sys.exit('flwr' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=_environment()).returncode == 0


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(sys.path)}


# -- parameters ---------------------------------------------------------------------------------------


def test_defaults_are_flowers() -> None:
    _, config = config_of(tiny.scenario_for("fedadam"), "strategies")
    signature = inspect.signature(flower_strategies.FedAdam).parameters
    assert config.model_dump(exclude=set(registry.load("strategies", "fedavg").Config.model_fields)) == {
        name: signature[name].default for name in ("eta", "eta_l", "beta_1", "beta_2", "tau")
    }


def test_parameters_reach_the_strategy() -> None:
    strategy = tiny.build("fedavgm", server_momentum=0.9, server_learning_rate=1)
    assert isinstance(strategy, FedAvgM)
    assert (strategy.server_momentum, strategy.server_learning_rate) == (0.9, 1)


def test_messages_are_laid_out_as_the_platform_says() -> None:
    strategy = tiny.build("fedavg")
    assert isinstance(strategy, FedAvg)
    assert strategy.weighted_by_key == "num-examples"
    assert (strategy.arrayrecord_key, strategy.configrecord_key) == (records.ARRAYS, records.CONFIG)


def test_unknown_parameter() -> None:
    text = error_of("fedavgm", server_momentm=0.9)
    assert "unknown key 'strategy.server_momentm'" in text
    assert "Did you mean 'server_momentum'?" in text
    assert "'server_learning_rate'" in text


def test_functions_and_keys_of_messages_cannot_be_set() -> None:
    for key in ("train_metrics_aggr_fn", "weighted_by_key", "arrayrecord_key", "configrecord_key"):
        assert f"unknown key 'strategy.{key}'" in error_of("fedavg", **{key: "x"})


def test_wrong_type() -> None:
    text = error_of("fedavgm", server_momentum="much")
    assert "strategy.server_momentum" in text
    assert "'much'" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number(value: float) -> None:
    assert "strategy.eta" in error_of("fedadam", eta=value)


def test_missing_parameter() -> None:
    scenario = tiny.scenario_for("fedavg").model_copy(update={"strategy": Component(name="qfedavg")})
    with pytest.raises(ScenarioError, match=r"strategy\.client_learning_rate' is missing"):
        config_of(scenario, "strategies")


def test_flowers_own_checks_come_when_the_file_is_read(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert "`beta` must be in the range [0, 0.5)" in error_of("fedtrimmedavg", beta=0.7)
        assert "clipping norm should be a positive value" in error_of("dp-server-fixed", clipping_norm=-1.0)
        config_of(tiny.scenario_for("fedprox"), "strategies")
    assert not caplog.records
    assert not logging.getLogger("flwr").disabled


def test_counts_are_not_negative() -> None:
    assert "strategy.num_malicious_nodes" in error_of("krum", num_malicious_nodes=-1)


def test_clients_report_their_loss_under_one_name() -> None:
    _, config = config_of(tiny.scenario_for("qfedavg"), "strategies")
    assert config.train_loss_key == "loss"


# -- wrappers -----------------------------------------------------------------------------------------


def test_wrapper_has_a_base() -> None:
    strategy = tiny.build("dp-server-fixed", cohort=4, base={"name": "fedavgm", "server_momentum": 0.9})
    assert isinstance(strategy.strategy, FedAvgM)
    assert strategy.strategy.server_momentum == 0.9
    assert strategy.strategy.min_train_nodes == 4
    assert strategy.num_sampled_clients == 4


def test_wrapper_averages_by_default() -> None:
    assert type(tiny.build("dp-client-fixed").strategy) is FedAvg


def test_wrong_base() -> None:
    text = error_of("dp-server-fixed", base={"name": "fedavgm", "server_momentm": 0.9})
    assert "unknown key 'strategy.base.server_momentm'" in text
    assert "Did you mean 'server_momentum'?" in text
    assert "strategy.base.name' is missing" in error_of("dp-server-fixed", base={"server_momentum": 0.9})
    assert "strategy.base.base.eta" in error_of(
        "dp-server-fixed", base={"name": "dp-client-fixed", **tiny.NEEDED["dp-client-fixed"], "base": _adam("x")}
    )
    assert "strategy.base: 'scaffold' merges scaffold" in error_of("dp-server-fixed", base="scaffold")
    assert "strategy.base: 'fedxgbcyclic' merges trees" in error_of("dp-client-fixed", base="fedxgbcyclic")
    with pytest.raises(PluginError, match=r"no strategy is named 'fedmediam'\. Did you mean 'fedmedian'"):
        config_of(tiny.scenario_for("dp-server-fixed", base="fedmediam"), "strategies")


def _adam(eta: object) -> dict[str, object]:
    return {"name": "fedadam", "eta": eta}


def test_base_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\n"
        "from trellis.registry import register\n"
        "from trellis_server.strategies import Sampling, sampling\n"
        "@register('strategies', 'mine')\n"
        "class Mine:\n"
        "    class Config(Sampling):\n"
        "        boost: float = 1.0\n"
        "    def __init__(self, config):\n"
        "        self.config = config\n"
        "    def build(self, context):\n"
        "        return FedAvg(**sampling(self.config, context))\n"
    )
    scenario = tiny.scenario_for("dp-server-fixed", base={"name": "mine.py:Mine"})
    scenario = scenario.model_copy(update={"base": str(tmp_path)})
    assert build_strategy(scenario, tiny.CLIENTS, 0).num_sampled_clients == tiny.CLIENTS  # type: ignore[attr-defined]
    scenario = tiny.scenario_for("dp-server-fixed", base={"name": "mine.py:Mine", "bost": 2.0})
    with pytest.raises(ScenarioError, match=r"strategy\.base\.bost"):
        build_strategy(scenario.model_copy(update={"base": str(tmp_path)}), tiny.CLIENTS, 0)


def test_class_without_build(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "from trellis.registry import register\nfrom trellis.scenario import Strict\n"
        "@register('strategies', 'bad')\nclass Bad:\n    class Config(Strict): pass\n"
    )
    scenario = tiny.scenario_for("bad.py:Bad").model_copy(update={"base": str(tmp_path)})
    with pytest.raises(PluginError, match="no method build"):
        build_strategy(scenario, tiny.CLIENTS, 0)


def test_noise_is_scaled_by_the_true_cohort() -> None:
    with pytest.raises(ScenarioError, match=r"strategy\.num_sampled_clients is 5, but 4 clients are sampled"):
        tiny.build("dp-server-fixed", cohort=4, num_sampled_clients=5)
    strategy = tiny.build("dp-server-fixed", base={"name": "fedavg", "fraction_train": 0.25})
    assert strategy.num_sampled_clients == 2


def test_noise_that_does_not_go_with_the_cohort() -> None:
    with pytest.raises(ScenarioError, match="clipped_count_stddev"):
        tiny.build("dp-server-adaptive", cohort=2, noise_multiplier=1.0)


# -- cohorts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cohort", "evaluators"), [(None, None), (1, 1), (3, 2), (8, 8)])
def test_cohort_sizes(cohort: int | None, evaluators: int | None) -> None:
    rounds = tiny.Rounds(tiny.build("fedavg", cohort=cohort, evaluators=evaluators))
    rounds.run(tiny.initial("fedavg"), range(1, 4))
    assert [len(set(cohort_)) for cohort_ in rounds.cohorts] == [cohort or tiny.CLIENTS] * 3
    assert rounds.evaluators == [evaluators or tiny.CLIENTS] * 3


def test_no_federated_evaluation() -> None:
    scenario = tiny.scenario_for("fedavg", cohort=3)
    evaluation = scenario.evaluation.model_copy(update={"federated_every": 0})
    strategy = build_strategy(scenario.model_copy(update={"evaluation": evaluation}), tiny.CLIENTS, 0)
    rounds = tiny.Rounds(strategy)
    rounds.run(tiny.initial("fedavg"), range(1, 3))
    assert rounds.evaluators == [0, 0]


def test_own_sampling() -> None:
    rounds = tiny.Rounds(tiny.build("fedavg", fraction_train=0.5, min_evaluate_nodes=3, fraction_evaluate=0.1))
    rounds.run(tiny.initial("fedavg"), range(1, 2))
    assert (len(rounds.cohorts[0]), rounds.evaluators[0]) == (4, 3)
    rounds = tiny.Rounds(tiny.build("fedavg", fraction_train=0.01))
    rounds.run(tiny.initial("fedavg"), range(1, 2))
    assert len(rounds.cohorts[0]) == 1


@pytest.mark.parametrize("key", ["fraction_train", "min_train_nodes"])
def test_cohort_set_twice(key: str) -> None:
    with pytest.raises(ScenarioError, match=rf"rounds\.clients_per_round and strategy\.{key} ") as caught:
        tiny.build("fedavg", cohort=3, **{key: 1})
    assert caught.value.code == "scenario-cohort"
    with pytest.raises(ScenarioError, match=rf"rounds\.clients_per_round and strategy\.base\.{key} "):
        tiny.build("dp-server-fixed", cohort=3, base={"name": "fedavg", key: 1})
    tiny.build("fedavg", **{key: 1})


@pytest.mark.parametrize("key", ["min_train_nodes", "min_evaluate_nodes", "min_available_nodes"])
def test_more_nodes_than_there_are(key: str) -> None:
    with pytest.raises(ScenarioError, match=rf"strategy\.{key} is 9, but there are only 8 clients"):
        tiny.build("fedavg", **{key: 9})


def test_fewer_clients_than_the_cohort() -> None:
    with pytest.raises(ScenarioError, match=r"rounds\.clients_per_round is 6, but there are only 4 clients"):
        build_strategy(tiny.scenario_for("fedavg", cohort=6), 4, 0)
    with pytest.raises(ScenarioError, match=r"evaluation\.clients is 6, but there are only 4 clients"):
        build_strategy(tiny.scenario_for("fedavg", evaluators=6), 4, 0)


def test_robust_strategies_need_their_cohort() -> None:
    with pytest.raises(ScenarioError, match="at least 7, but 6 clients"):
        tiny.build("bulyan", cohort=6, num_malicious_nodes=1)
    with pytest.raises(ScenarioError, match="at least 5, but 4 clients"):
        tiny.build("krum", fraction_train=0.5, num_malicious_nodes=1)
    tiny.build("bulyan", cohort=7, num_malicious_nodes=1)
    tiny.build("multikrum", cohort=5, num_malicious_nodes=1)


def test_one_client_a_round_in_turn() -> None:
    strategy = tiny.build("fedxgbcyclic")
    assert isinstance(strategy, FedXgbCyclic)
    rounds = tiny.Rounds(strategy, "fedxgbcyclic")
    rounds.run(tiny.initial("fedxgbcyclic"), range(1, tiny.CLIENTS + 1))
    assert sorted(client for cohort in rounds.cohorts for client in cohort) == list(range(tiny.CLIENTS))
    with pytest.raises(ScenarioError, match="trains one client a round"):
        tiny.build("fedxgbcyclic", cohort=3)
    assert build_strategy(tiny.scenario_for("fedxgbcyclic"), 1, 0).min_train_nodes == 1  # type: ignore[attr-defined]


# -- rounds -------------------------------------------------------------------------------------------


def run(name: str, seed: int) -> ArrayRecord:
    return tiny.Rounds(tiny.build(name, seed, cohort=_cohort(name)), name, seed).run(tiny.initial(name), range(1, 3))


def _cohort(name: str) -> int | None:
    return None if name == "fedxgbcyclic" else 6


@pytest.mark.parametrize("name", tiny.STRATEGIES)
def test_two_rounds(name: str) -> None:
    before, after = tiny.initial(name), run(name, 0)
    assert list(after) == list(before)
    assert records.digest(after) != records.digest(before)
    for key, array in after.items():
        assert array.dtype == before[key].dtype
        assert np.isfinite(records.view(array)).all()
    assert records.digest(after) == records.digest(run(name, 0))
    # Eight clients in cohorts of six, or in another order: another seed gives another model.
    assert records.digest(after) != records.digest(run(name, 1))


@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize("kind", ["fixed", "adaptive"])
def test_updates_are_clipped(side: str, kind: str) -> None:
    """Without noise the mean of clipped updates is no longer than the clipping norm; unclipped it is."""
    name, norm = f"dp-{side}-{kind}", 0.05
    params = {"clipping_norm": norm} if kind == "fixed" else {"initial_clipping_norm": norm}
    strategy = tiny.build(name, **params | {"noise_multiplier": 0.0})
    assert _moved(strategy, name) <= norm * 1.001
    assert _moved(tiny.build("fedavg"), "fedavg") > 10 * norm


def _moved(strategy: flower_strategies.Strategy, name: str) -> float:
    before = tiny.initial(name)
    after = tiny.Rounds(strategy, name).run(before, range(1, 2))
    return float(np.sqrt(sum(np.square(after[k].numpy() - before[k].numpy()).sum() for k in before)))


# -- scaffold -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_scaffold_follows_its_paper(fold: bool, lr: float) -> None:
    """x += lr · mean(y_i - x) and c += |S|/N · mean(c_i+ - c_i), equal weights, in float64 by hand."""
    strategy = tiny.build("scaffold", cohort=4, server_lr=lr)
    assert isinstance(strategy, Scaffold)
    rounds = tiny.Rounds(strategy, "scaffold", fold=fold)
    result = rounds.run(tiny.initial("scaffold"), range(1, 4))
    x = {k: a.numpy().astype(float) for k, a in tiny.initial("scaffold").items()}
    c = np.zeros((5, 3))
    for number, cohort in enumerate(rounds.cohorts, start=1):
        y = [tiny.train(client, number, x) for client in cohort]
        delta = np.zeros_like(c)
        for own in y:
            own["w"], change = tiny.scaffolded(x["w"], own["w"], c)
            delta += change / len(cohort)
        # Clients send no control for "b": it is averaged, and its control stays zero.
        x = {
            "w": x["w"] + lr * np.mean([own["w"] - x["w"] for own in y], axis=0),
            "b": np.mean([own["b"] for own in y], axis=0),
        }
        c = c + len(cohort) / tiny.CLIENTS * delta
    np.testing.assert_allclose(records.view(result["w"]), x["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(records.view(result["b"]), x["b"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(strategy.control["w"], c, rtol=1e-5, atol=1e-6)
    assert not strategy.control["b"].any()
    weights = np.array([tiny.examples(client) for client in rounds.cohorts[-1]])
    losses = 1.0 + np.array(rounds.cohorts[-1])
    assert rounds.metrics[-1] is not None
    assert rounds.metrics[-1]["loss"] == pytest.approx(float((weights * losses).sum() / weights.sum()))


def test_scaffold_needs_controls() -> None:
    rounds = tiny.Rounds(tiny.build("scaffold"), "fedavg")
    with pytest.raises(RoundError, match="'control'"):
        rounds.run(tiny.initial("scaffold"), range(1, 2))
