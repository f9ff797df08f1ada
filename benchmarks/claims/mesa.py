"""Mesa: memory alive for the backward pass, accuracy, and the direction of gradients at 8 and at 2 bits.

Memory is measured and not counted: every storage that a forward pass makes is followed by a weak reference, and those
that are still there while the loss is held are summed. Gradients are those of steps in the middle of training, under
the running ranges that the steps before have left.

    python benchmarks/claims mesa
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from common import Claim, compare, paired, spread
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from trellis import scenario
from trellis.data.base import Batch
from trellis.runs import CellFolder
from trellis.scenario import Scenario
from trellis_clients.site import Cell as SiteCell
from trellis_clients.site import Site
from trellis_clients.trainer import Turn
from trellis_clients.trainers.efficiency import _activations
from trellis_clients.trainers.efficiency._activations import Compression
from trellis_clients.trainers.efficiency._codes import Layout, Range
from trellis_clients.trainers.efficiency._memory import bytes_alive
from trellis_clients.trainers.efficiency.mesa import RANGES, Mesa

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "mesa.yaml"
VARIANTS = {"mesa": {"trainer": {"bits": 8}}, "exact": {"trainer": {"bits": 32}}}
LONGER = ["rounds.count=10", "trainer.local_epochs=3", "evaluation.federated_every=0"]
MOST = 0.35
"""Share of the memory of exact training."""
POINTS = 1.0
"""Of accuracy, that may be lost."""
ALIKE, APART = 0.99, 0.9
"""Cosine with the exact gradient at least, at 8 bits, and below which it is clearly lower."""
BATCHES, DRAWS = 6, 4
"""Steps whose gradients are compared, and draws of the rounding in each."""


def measure(seeds: int = 6) -> list[Claim]:
    cells = compare(SCENARIO, VARIANTS, range(seeds), LONGER, also=at_the_end)
    accuracy = {name: [100 * cell.last("central", "accuracy") for cell in of] for name, of in cells.items()}
    gained = paired(accuracy["mesa"], accuracy["exact"])
    found = [cell.extra for cell in cells["mesa"]]
    shares, fused = ([each[name]["8"] / each[name]["32"] for each in found] for name in ("explicit", "fused"))
    kilobytes = [found[0]["explicit"][bits] / 1000 for bits in ("8", "32")]
    slower = median(each["slower"] for each in found)
    eight, two = ([each["cosines"][bits] for each in found] for bits in ("8", "2"))
    means = [[mean(of) for of in each] for each in (eight, two)]
    return [
        Claim(
            f"at most {MOST} of the memory that is alive for the backward pass",
            "the same transformer with exact activations",
            f"{spread(shares, 3)} ({kilobytes[0]:.0f} of {kilobytes[1]:.0f} kB a step of 32 images, measured as "
            f"storages that still exist); with torch's fused attention {spread(fused, 3)}",
            "held" if max(shares) <= MOST else "not held",
            f"A step takes {slower:.1f} times as long.",
        ),
        Claim(
            f"accuracy at most {POINTS:g} point lower after equal steps",
            "the same with exact activations",
            f"{spread(accuracy['mesa'])} against {spread(accuracy['exact'])} %: {spread(gained, sign=True)} points, "
            f"{seeds} seeds",
            "held" if mean(gained) >= -POINTS else "not held",
            two_sided(gained),
        ),
        Claim(
            f"the gradient keeps its direction at 8 bits (cosine at least {ALIKE} in every seed) and loses it at 2 "
            f"(below {APART})",
            "the exact gradients of the same steps, under the running ranges of training",
            f"cosine {spread(means[0], 4)} at 8 bits (lowest of {BATCHES * DRAWS} draws a seed "
            f"{min(map(min, eight)):.4f}), {spread(means[1], 3)} at 2; "
            f"{100 * mean(each['clipped'] for each in found):.2f} % of the values clipped",
            "held" if min(means[0]) >= ALIKE and max(means[1]) < APART else "not held",
        ),
    ]


def two_sided(gained: list[float]) -> str:
    """Say whether a paired difference is beyond two standard errors, and to which side."""
    error = stdev(gained) / math.sqrt(len(gained))
    if abs(mean(gained)) <= 2 * error:
        return "No difference beyond the spread, to either side."
    side = "higher" if mean(gained) > 0 else "lower"
    return f"It is {side}, by more than two standard errors of the difference; why was not looked into."


def at_the_end(each: Scenario, folder: CellFolder) -> dict[str, Any]:
    """Measure a finished run of Mesa: memory of a step, time of a turn, cosines under running ranges, clipped share."""
    if scenario.plain(each)["trainer"]["bits"] == 32:
        return {}
    site, batches, ranges = in_training(each, folder)
    fused = each.model_copy(update={"trainer": each.trainer.model_copy(update={"attention": "fused"})})
    cosines: dict[str, list[float]] = {"8": [], "2": []}
    with counting_clipped() as share:
        for number, batch in enumerate(batches):
            exact = gradient(site, batch, 32, {}, 0)
            for draw in range(DRAWS):
                for bits, into in cosines.items():
                    noisy = gradient(site, batch, int(bits), ranges, 100 * number + draw)
                    into.append(float(F.cosine_similarity(exact, noisy, dim=0)))
    return {
        "explicit": alive(site, batches[0]),
        "fused": alive(in_training(fused, folder)[0], batches[0]),
        "slower": seconds(each, 8) / seconds(each, 32),
        "cosines": cosines,
        "clipped": share["clipped"] / share["all"],
    }


def in_training(each: Scenario, folder: CellFolder) -> tuple[Site, list[Batch], dict[str, list[Range]]]:
    """Return a run's model after one more turn of client 0 (36 steps), the next batches, and the ranges by then."""
    site = Site(SiteCell(scenario.plain(each), folder.seed))
    site.trainer.load_shared(site.model, load_file(folder.path / "model.safetensors"))
    state: dict[str, Any] = {}
    data, turn = site.federation.client(0).train, turn_of(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        site.trainer.fit(site.model, site.federation.client(0), state, turn)
    ranges = {name: [Range(**span) for span in spans] for name, spans in state[RANGES].items()}
    whole = (batch for batch in site.trainer.batches(data, turn_of(2)) if len(batch) == site.trainer.config.batch_size)
    return site, list(islice(whole, BATCHES)), ranges


def turn_of(number: int) -> Turn:
    return Turn(number, 10, 0, 3, torch.Generator().manual_seed(number))


def compression(site: Site, bits: int, ranges: dict[str, list[Range]]) -> Compression:
    own = [*site.model.parameters(), *site.model.buffers()]
    return Compression(bits, 4, True, 0.9, copy.deepcopy(ranges), own)


def gradient(site: Site, batch: Batch, bits: int, ranges: dict[str, list[Range]], draw: int) -> Tensor:
    """Return the whole gradient of one step, whose values enter the ranges before they are used, as in training."""
    assert isinstance(site.trainer, Mesa)
    site.model.train().zero_grad(set_to_none=True)
    site.trainer.compression = compression(site, bits, ranges)
    with torch.random.fork_rng():
        torch.manual_seed(draw)
        site.trainer.loss(site.model, batch, turn_of(3)).backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in site.model.parameters() if p.grad is not None])


@contextmanager
def counting_clipped() -> Iterator[dict[str, int]]:
    """Count the values outside the ranges that they are quantised under."""
    plain, share = _activations.compress, {"clipped": 0, "all": 0}

    def noted(x: Tensor, bits: int, span: Range, layout: Layout, stochastic: bool) -> Any:
        rows, low = layout.rows(x), layout.by_column(span.beta)
        high = low + layout.by_column(span.alpha)
        share["clipped"] += int(((rows < low) | (rows > high)).sum())
        share["all"] += rows.numel()
        return plain(x, bits, span, layout, stochastic)

    _activations.compress = noted
    try:
        yield share
    finally:
        _activations.compress = plain


def alive(site: Site, batch: Batch) -> dict[str, int]:
    """Return the bytes alive after a forward pass, at 8 and at 32 bits."""
    assert isinstance(site.trainer, Mesa)
    found = {}
    for bits in (8, 32):
        site.trainer.compression = compression(site, bits, {})
        found[str(bits)] = bytes_alive(lambda: site.trainer.loss(site.model.train(), batch, turn_of(3)))
    return found


def seconds(each: Scenario, bits: int) -> float:
    """Return the CPU time of a turn of client 0, the quickest of three."""
    trainer = each.trainer.model_copy(update={"bits": bits})
    site = Site(SiteCell(scenario.plain(each.model_copy(update={"trainer": trainer})), 0))
    taken = []
    for number in range(1, 4):
        started = time.process_time()
        site.trainer.fit(site.model, site.federation.client(0), {}, turn_of(number))
        taken.append(time.process_time() - started)
    return min(taken)
