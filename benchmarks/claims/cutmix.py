"""Does CutMix see digits that are partly covered, and is it less sure of itself?

python benchmarks/claims cutmix
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import Claim, Verdict, compare, paired, spread
from safetensors.torch import load_file

from trellis import scenario
from trellis.runs import CellFolder
from trellis.scenario import Scenario
from trellis_clients.site import Cell, Site

SCENARIO = Path(__file__).resolve().parents[2] / "scenarios" / "trainers" / "cutmix.yaml"
COVERS = 4
"""Boxes tried on every test image."""
TOLERANCE = 1.0
"""Points of accuracy on clean images that may be lost."""


def measure(seeds: int = 5) -> tuple[list[Claim], dict[str, Any]]:
    cells = compare(SCENARIO, seeds=range(seeds), also=tested)
    found = {variant: [cell.extra for cell in each] for variant, each in cells.items()}

    def gain(key: str) -> list[float]:
        return paired([each[key] for each in found["cutmix"]], [each[key] for each in found["plain"]])

    def of(variant: str, key: str) -> str:
        return spread([each[key] for each in found[variant]])

    covered, clean, sure = gain("covered"), gain("clean"), gain("confidence")
    claims = [
        Claim(
            "more digits are recognised where a quarter of the image is covered",
            "the same steps without CutMix",
            f"{of('cutmix', 'covered')} against {of('plain', 'covered')} %: {spread(covered, sign=True)} points, "
            f"{seeds} seeds",
            verdict(covered),
        ),
        Claim(
            f"whole digits do not suffer (at most {TOLERANCE:g} point lower)",
            "the same steps without CutMix",
            f"{of('cutmix', 'clean')} against {of('plain', 'clean')} %: {spread(clean, sign=True)} points",
            "held" if mean(clean) >= -TOLERANCE else "not held",
        ),
        Claim(
            "the model is less sure of itself (mean largest probability on whole test images)",
            "the same steps without CutMix",
            f"{of('cutmix', 'confidence')} against {of('plain', 'confidence')} %: {spread(sure, sign=True)} points",
            "held" if all(s < 0 for s in sure) else "in part" if mean(sure) < 0 else "not held",
        ),
    ]
    return claims, {"by_seed": {name: {key: [e[key] for e in each] for key in each[0]} for name, each in found.items()}}


def verdict(gains: list[float]) -> Verdict:
    """Held if every seed gains, in part if their mean does."""
    return "held" if min(gains) > 0 else "in part" if mean(gains) > 0 else "not held"


@torch.no_grad()
def tested(each: Scenario, folder: CellFolder) -> dict[str, Any]:
    """Test the final model on whole images, and with a box of half the side at a random place set to zero."""
    site = Site(Cell(scenario.plain(each), folder.seed))
    site.trainer.load_shared(site.model, load_file(folder.path / "model.safetensors"))
    site.model.eval()
    test = site.federation.data.test
    batch = test.batch(torch.arange(len(test)))
    logits = site.model(batch.x)
    side = batch.x.shape[-1]
    generator = torch.Generator().manual_seed(0)  # the same covers for every model
    right = []
    for _ in range(COVERS):
        x = batch.x.clone()
        for image, (row, column) in zip(x, torch.randint(side // 2 + 1, (len(x), 2), generator=generator), strict=True):
            image[:, row : row + side // 2, column : column + side // 2] = 0
        right.append(float((site.model(x).argmax(1) == batch.y).float().mean()))
    return {
        "clean": 100 * float((logits.argmax(1) == batch.y).float().mean()),
        "covered": 100 * mean(right),
        "confidence": 100 * float(logits.softmax(1).max(1).values.mean()),
    }
