"""docs/papers.md says what was measured, and knows every bundled trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trellis import registry

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = ROOT / "benchmarks" / "claims"
RESULTS = ROOT / "benchmarks" / "results" / "claims"
PAGE = ROOT / "docs" / "papers.md"
PAPERS = sorted(
    path.stem.replace("_", "-")
    for path in CLAIMS.glob("*.py")
    if path.stem not in ("__main__", "common") and not path.stem.startswith("_")
)


def test_the_page_holds_the_stored_results():
    code = "import runpy; print(runpy.run_path('__main__.py', run_name='claims')['table'](), end='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=CLAIMS, capture_output=True, text=True, check=True)
    assert done.stdout in PAGE.read_text(), "run: python benchmarks/claims --table"


@pytest.mark.parametrize("paper", PAPERS)
def test_every_claim_was_measured(paper):
    stored = json.loads((RESULTS / f"{paper}.json").read_text())
    assert stored["claims"]
    for claim in stored["claims"]:
        assert claim["held"] in ("held", "not held", "in part")
        assert any(word in claim["measured"] for word in ("±", "every seed", "median")), "figures without a spread"
        assert claim["held"] == "held" or claim["finding"], "it did not hold: why?"


@pytest.mark.parametrize("name", sorted(registry.plugins("trainers")))
def test_every_trainer_has_a_row(name):
    assert f"{name.replace('-', '_')}.py" in PAGE.read_text() or f"`{name}`" in PAGE.read_text()
