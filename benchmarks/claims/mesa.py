"""Mesa: bytes kept for the backward pass, accuracy, and the direction of gradients at 8 and at 2 bits."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import Claim, compare, paired, spread
from safetensors.torch import load_file
from torch.nn import functional as F

from trellis import scenario
from trellis.runs import CellFolder
from trellis.scenario import Scenario
from trellis_clients.site import Cell as SiteCell
from trellis_clients.site import Site
from trellis_clients.trainer import Turn, in_order
from trellis_clients.trainers.efficiency._activations import Compression

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "mesa.yaml"
VARIANTS = {"mesa": {"trainer": {"bits": 8}}, "exact": {"trainer": {"bits": 32}}}
FUSED = {"fused": {"trainer": {"bits": 8, "attention": "fused"}, "rounds": {"count": 1}}}


def measure(seeds: int = 3) -> list[Claim]:
    cells = compare(SCENARIO, VARIANTS, range(seeds), ["evaluation.federated_every=0"], also=cosines)
    fused = compare(SCENARIO, FUSED, [0], ["evaluation.federated_every=0"])["fused"][0]
    accuracy = {name: [100 * cell.last("central", "accuracy") for cell in of] for name, of in cells.items()}
    lost = paired(accuracy["exact"], accuracy["mesa"])
    share = [cell.last("train", "saved-share") for cell in cells["mesa"]]
    eight, two = ([cell.extra[bits] for cell in cells["exact"]] for bits in ("8", "2"))
    kilobytes = [cells["mesa"][0].last("train", name) / 1000 for name in ("exact-bytes", "saved-bytes")]
    return [
        Claim(
            "at most 0.35 of the bytes kept for the backward pass",
            "the same transformer with exact activations",
            f"{spread(share, 3)} ({kilobytes[1]:.0f} of {kilobytes[0]:.0f} kB a step of 32 images);"
            f" with torch's fused attention {fused.last('train', 'saved-share'):.3f}",
            "held" if max(share) <= 0.35 else "not held",
        ),
        Claim(
            "accuracy at most 1 point lower after equal steps",
            "the same with exact activations",
            f"{spread(accuracy['mesa'])} against {spread(accuracy['exact'])} %; lost {spread(lost)} points",
            "held" if mean(lost) <= 1 else "not held",
        ),
        Claim(
            "the gradient keeps its direction at 8 bits (cosine at least 0.99) and loses it at 2",
            "the exact gradient at the same trained weights",
            f"cosine {spread(eight, 4)} at 8 bits, {spread(two, 3)} at 2",
            "held" if min(eight) >= 0.99 and max(two) < 0.99 else "not held",
        ),
    ]


def cosines(each: Scenario, folder: CellFolder) -> dict[str, Any]:
    """Return the cosine of the whole gradient at 8 and 2 bits with the exact one, at a run's final weights."""
    site = Site(SiteCell(scenario.plain(each), folder.seed))
    site.trainer.load_shared(site.model, load_file(folder.path / "model.safetensors"))
    batch = next(in_order(site.federation.client(0).train, 128))
    exact = gradient(site, batch, 32)
    return {str(bits): float(F.cosine_similarity(exact, gradient(site, batch, bits), dim=0)) for bits in (8, 2)}


def gradient(site: Site, batch: Any, bits: int) -> torch.Tensor:
    site.model.train().zero_grad(set_to_none=True)
    own = [*site.model.parameters(), *site.model.buffers()]
    site.trainer.compression = Compression(bits, 4, True, 0.9, {}, own)  # type: ignore[attr-defined]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        site.trainer.loss(site.model, batch, Turn(1, 1, 0, 1, torch.Generator())).backward()
    return torch.cat([p.grad.flatten() for p in site.model.parameters() if p.grad is not None])
