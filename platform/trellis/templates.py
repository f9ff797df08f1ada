"""A start for a trainer of one's own: a file that works, a scenario that runs it, a test that checks it."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from trellis.errors import PluginError

TRAINER = Template('''\
"""$title: say in one line what the method does."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from trellis.data.base import Batch
from trellis.registry import register
from trellis_clients.trainer import Trainer, TrainerConfig, Turn


@register("trainers", "$name", paper="", takes=("image",), sends="weights")
class $cls(Trainer):
    """Cross-entropy with label smoothing, as a start: replace `loss` by your method's.

    The other hooks (build, batches, optimizer, adjust_gradients, fit, evaluate, shared, adapt) have defaults
    that do the ordinary thing; override the ones your method changes.
    """

    class Config(TrainerConfig):
        smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1

    def loss(self, model: nn.Module, batch: Batch, turn: Turn) -> Tensor:
        return F.cross_entropy(model(batch.x), batch.y, label_smoothing=self.config.smoothing)
''')

SCENARIO = Template("""\
name: $name
data: digits
clients: 10
partition: {name: dirichlet, alpha: 0.5}
model: small-cnn
trainer:
  name: $module.py:$cls
  lr: 0.1
  smoothing: 0.1
rounds: {count: 5, clients_per_round: 5}
runtime: {grid: local}
""")

TEST = Template('''\
"""The trainer keeps the contract, and does what its paper says."""

from pathlib import Path

import torch
from torch.nn import functional as F
from trellis_clients.contract import bench, check

HERE = Path(__file__).parent


def test_keeps_the_trainer_contract():
    check(HERE / "$module.yaml")


def test_without_smoothing_the_loss_is_cross_entropy():
    trainer, model, batch, turn = bench(HERE / "$module.yaml", ["trainer.smoothing=0.0"])
    expected = F.cross_entropy(model(batch.x), batch.y)
    torch.testing.assert_close(trainer.loss(model, batch, turn), expected)
''')


def write_trainer(name: str, folder: Path) -> list[Path]:
    """Write ``name``'s trainer, scenario and test into a folder; existing files are never overwritten.

    Raises:
        PluginError: the name is not usable, or a file is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise PluginError("new-name", f"{name!r}: use small letters, digits and hyphens, e.g. 'my-method'")
    module = name.replace("-", "_")
    words = {
        "name": name,
        "module": module,
        "cls": "".join(part.capitalize() for part in name.split("-")),
        "title": name.replace("-", " ").capitalize(),
    }
    files = {
        folder / f"{module}.py": TRAINER,
        folder / f"{module}.yaml": SCENARIO,
        folder / f"test_{module}.py": TEST,
    }
    for path in files:
        if path.exists():
            raise PluginError("new-exists", f"{path} is there already; nothing was written")
    folder.mkdir(parents=True, exist_ok=True)
    for path, template in files.items():
        path.write_text(template.substitute(words))
    return list(files)
