"""What a scenario asks of a device, in terms of the edge runtime. The trainer's options decide, as in simulation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trellis.errors import DataError, listed
from trellis_clients.edge import adapters
from trellis_clients.edge.predictor import Predictor
from trellis_clients.edge.runtime import Selection

CEMA = "cema"
ADAPTERS = {"tta-source": "none", "tta-bn": "prediction-bn", "tta-t3a": "t3a", "tta-lame": "lame"}
"""Trainers that upload nothing, and the adapter that each of them is."""

NOTHING = Selection(e_max=0.0)
EVERYTHING = Selection(e_max=math.inf, e_min=-1.0)


@dataclass(frozen=True)
class Duty:
    """A device's part in a scenario.

    Attributes:
        cell: the cell of the experiment that it belongs to.
        trainer: name of the trainer.
        options: its parameters, defaults included.
        batch_size: examples that the scenario calls a batch.
        batches: K, of a report.
        most_examples: what the gate lets a reply claim at most.
    """

    cell: str
    trainer: str
    options: Mapping[str, Any]
    batch_size: int
    batches: int = 1
    most_examples: int = 1_000_000

    @property
    def selection(self) -> Selection:
        """Which samples are uploaded."""
        o = self.options
        if self.trainer != CEMA:
            return NOTHING
        budget = o.get("budget_bytes_per_hour")
        if not o.get("filter", True):
            return Selection(EVERYTHING.e_max, EVERYTHING.e_min, bytes_per_hour=budget)
        usual = Selection()
        return Selection(o.get("e_max", usual.e_max), o.get("e_min", usual.e_min), o.get("decay", usual.decay), budget)

    def adapter(self, predictor: Predictor) -> tuple[str, dict[str, Any]]:
        """Return name and options of the adapter that answers.

        CEMA's running mean of batch-norm statistics at rate m is the adapter ``prediction-bn`` with weight m. It starts
        from the source's statistics, in simulation from the first batch's, and starts again when parameters change.
        """
        o = self.options
        if self.trainer != CEMA:
            name = ADAPTERS[self.trainer]
            return name, {key: o[key] for key in adapters.named(name).Config.model_fields if key in o}
        if o.get("statistics", "edge") == "source" or not predictor.has_batch_norm:
            return "none", {}
        rate = float(o.get("momentum_statistics", 0.1))
        return "prediction-bn", {"weight": rate, "moving": rate < 1}


def read(setup: Any) -> Duty:
    """Read the link's description of a cell.

    Args:
        setup: its bytes.

    Raises:
        DataError: it cannot be read, or asks for what a device without torch cannot do.
    """
    try:
        said = json.loads(bytes(setup))
        trainer = dict(said["scenario"]["trainer"])
        batch_size = int(trainer.get("stream", {}).get("batch_size", 32))
        batches = int(said["scenario"].get("strategy", {}).get("batches", 1))
        most = int(said["scenario"].get("screening", {}).get("max_examples", Duty.most_examples))
        duty = Duty(str(said["cell"]), str(trainer.pop("name")), trainer, batch_size, batches, most)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError("link-setup", "the server's description of the cell cannot be read") from None
    if duty.trainer not in (CEMA, *ADAPTERS):
        raise DataError(
            "edge-trainer",
            f"trainer {duty.trainer!r} does not run on a device without torch; {listed((CEMA, *ADAPTERS))} do",
        )
    if duty.options.get("statistics") == "cloud":
        raise DataError(
            "edge-trainer",
            "trainer.statistics is 'cloud': an exported model takes scale and shift, no statistics; a deployed device"
            " knows 'edge' and 'source'",
        )
    if duty.batch_size < 1 or duty.batches < 1:
        raise DataError("link-setup", f"{duty.batches} batches of {duty.batch_size} examples make no report")
    return duty
