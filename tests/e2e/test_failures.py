"""Bad clients, bad trainers, missed quorums: one line that says who and why, and a folder that goes on."""

from __future__ import annotations

import json

import pytest

from federations import DIGITS, lines, run, write
from trellis import experiment, scenario
from trellis.errors import TrellisError
from trellis.runs import Run, read_status

BAD = """\
import math, os, sys
import torch
from trellis.registry import register
from trellis_clients.trainer import Trainer, TrainerConfig

@register("trainers", "bad", takes=("image",), sends="weights")
class Bad(Trainer):
    class Config(TrainerConfig):
        how: str
        who: tuple[int, ...] = (2,)
        until: int = 99

    def fit(self, model, data, state, turn):
        metrics = super().fit(model, data, state, turn)
        if turn.client not in self.config.who or turn.round > self.config.until:
            return metrics
        if self.config.how == "raises":
            raise ValueError("no disk")
        if self.config.how == "exits":
            sys.exit(3)
        if self.config.how == "nan":
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)
        if self.config.how == "nan loss":
            return {"loss": math.nan}
        if self.config.how == "nothing":
            return None
        if self.config.how == "text":
            return {"loss": "low"}
        if self.config.how == "shape":
            turn.reply["arrays"] = {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in self.shared(model).items()}
        if self.config.how == "dies":
            os._exit(1)
        return metrics
"""

HOW = {
    "raises": "ValueError: no disk",
    "exits": "SystemExit",
    "nan": "nonfinite",
    "nan loss": "nonfinite",
    "nothing": "must return metrics",
    "text": "must return metrics",
    "shape": "shape",
}


def bad(folder, how: str, **extra) -> str:
    (folder / "bad.py").write_text(BAD)
    config = json.dumps({"name": "bad.py:Bad", "how": how, **extra})
    return DIGITS.replace("{name: sgd, lr: 0.1, batch_size: 32}", config).replace("clients_per_round: 4", "quorum: 0.8")


@pytest.mark.battery("F9")
@pytest.mark.parametrize(("how", "reason"), HOW.items(), ids=HOW)
def test_a_bad_client_fails_its_own_reply_only(tmp_path, how, reason):
    current, outcome = run(tmp_path, text=bad(tmp_path, how))
    assert not outcome.failed
    for line in lines(current)[1:]:
        assert (line["cohort"], line["replies"]) == (6, 5)
        (failure,) = [failure for failure in line["failures"] if failure["phase"] == "train"]
        assert failure["client"] == 2
        assert {failure["client"] for failure in line["failures"]} == {2}
    assert reason in lines(current)[1]["failures"][0]["reason"]
    assert lines(current)[-1]["central"]["loss"] < lines(current)[0]["central"]["loss"]


@pytest.mark.battery("F8")
def test_a_worker_that_dies_fails_its_client_and_the_run_goes_on(tmp_path, ray_session):
    text = bad(tmp_path, "dies", until=1)
    current, outcome = run(tmp_path, ("runtime.grid=ray", "runtime.workers=2", "rounds.count=2"), text)
    assert not outcome.failed
    (failure,) = lines(current)[1]["failures"]
    assert failure["client"] == 2
    assert "worker died" in failure["reason"]
    assert lines(current)[2]["failures"] == []


def test_a_missed_quorum_ends_the_run_with_a_reason_and_it_resumes(tmp_path):
    text = bad(tmp_path, "raises", who=[1, 2, 3])
    current, outcome = run(tmp_path, text=text)
    error = outcome.failed["main-seed0"]
    assert error.code == "quorum-missed"
    assert "3 of 6 replies counted, 5 were needed" in str(error)
    assert "client 1: ValueError: no disk" in str(error)
    assert read_status(current.path)["state"] == "failed"
    assert [line["round"] for line in lines(current)] == [0]

    # The operator mends the cause; the same folder goes on to the end.
    (tmp_path / "bad.py").write_text(BAD.replace('raise ValueError("no disk")', "pass"))
    outcome = experiment.execute(Run.open(current.path))
    assert not outcome.failed
    assert read_status(current.path)["state"] == "complete"


CONTRACT = {
    "does not import": ("import nothing_of_this_name", "does not import: ModuleNotFoundError"),
    "syntax": ("def f(:", "does not import: SyntaxError"),
    "no such class": ("class Goed: pass", "no class 'Good'. Did you mean 'Goed'?"),
    "not declared": ("class Good: pass", "not declared with @register"),
    "no config": (
        "from trellis.registry import register\n@register('trainers', 'good')\nclass Good: pass",
        "no nested Config",
    ),
    "of another kind": (
        "from trellis.registry import register\nfrom trellis.scenario import Strict\n"
        "@register('models', 'good')\nclass Good:\n    class Config(Strict): pass",
        "one of the models",
    ),
}


@pytest.mark.parametrize(("code", "words"), CONTRACT.values(), ids=CONTRACT)
def test_a_broken_trainer_file_is_refused_before_work_starts(tmp_path, code, words):
    (tmp_path / "mine.py").write_text(code)
    path = write(tmp_path, DIGITS.replace("name: sgd", "name: 'mine.py:Good'"))
    with pytest.raises(TrellisError) as caught:
        scenario.load(path)
    assert words in str(caught.value)


def test_a_partition_that_leaves_a_client_empty_is_an_error(tmp_path):
    with pytest.raises(TrellisError) as caught:
        run(tmp_path, ("clients=500", "partition.alpha=0.01", "rounds.clients_per_round=4"))
    assert caught.value.code == "partition-empty"


def test_one_failing_variant_leaves_the_others_alone(tmp_path):
    text = bad(tmp_path, "raises", who=[1, 2, 3]) + "variants:\n  broken: {}\n  plain: {trainer: sgd}\n"
    current, outcome = run(tmp_path, text=text)
    assert list(outcome.failed) == ["broken-seed0"]
    assert [summary["variant"] for summary in outcome.summaries] == ["plain"]
    assert read_status(current.path)["state"] == "failed"
