"""Measure what the papers claim, at small scale, and write it into docs/papers.md.

    python benchmarks/claims                      # every paper; hours on one core
    python benchmarks/claims cutmix saf           # these
    python benchmarks/claims --seeds 5 cutmix
    python benchmarks/claims --table              # only write the table anew from the stored results

One module a paper, named by it, with ``measure(seeds) -> list[Claim]``, or with ``(list[Claim], details)`` where
``details`` is kept beside the claims in ``benchmarks/results/claims/<paper>.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from common import Claim

from trellis.runs import environment

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "claims"
PAGE = HERE.parents[1] / "docs" / "papers.md"
BEGIN, END = "<!-- claims: written by benchmarks/claims -->", "<!-- end of claims -->"
NO_MEASUREMENTS = {"__main__", "common"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("papers", nargs="*", metavar="PAPER", help=f"of {', '.join(papers())}")
    parser.add_argument("--seeds", type=int, help="seeds of each; by default each paper's own number")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the table from stored results")
    options = parser.parse_args()
    if unknown := sorted(set(options.papers) - set(papers())):
        parser.error(f"no such paper: {', '.join(unknown)}; there are {', '.join(papers())}")
    for paper in [] if options.table else options.papers or papers():
        store(paper, options.seeds)
    write_table()


def papers() -> list[str]:
    """Return every paper with a measurement, by the name of its file."""
    stems = {path.stem for path in HERE.glob("*.py")} - NO_MEASUREMENTS
    return sorted(stem.replace("_", "-") for stem in stems if not stem.startswith("_"))


def store(paper: str, seeds: int | None) -> None:
    """Measure one paper's claims and keep them."""
    module = importlib.import_module(paper.replace("-", "_"))
    started = time.perf_counter()
    measured = module.measure(**({} if seeds is None else {"seeds": seeds}))
    claims, details = measured if isinstance(measured, tuple) else (measured, None)
    result: dict[str, Any] = {
        "paper": paper,
        "environment": {**environment(), "command": f"python benchmarks/claims {paper}"},
        "seconds": round(time.perf_counter() - started, 1),
        "claims": [dataclasses.asdict(claim) for claim in claims],
    }
    if details is not None:
        result["details"] = details
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{paper}.json").write_text(json.dumps(result, indent=1) + "\n")
    for claim in claims:
        print(row(paper, claim), flush=True)


def write_table() -> None:
    """Put all stored results between the two marks in docs/papers.md."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or END not in text:
        sys.exit(f"{PAGE} lacks the marks {BEGIN} and {END}")
    PAGE.write_text(f"{before}{BEGIN}\n{table()}{END}{after}")


def table() -> str:
    """Return the table of all stored results, papers in alphabetical order."""
    lines = ["| paper | claim | against | measured | outcome |", "|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        stored = json.loads(path.read_text())
        lines += [row(stored["paper"], Claim(**claim)) for claim in stored["claims"]]
    return "\n".join(lines) + "\n"


def row(paper: str, claim: Claim) -> str:
    outcome = f"**{claim.held}**" + (f". {claim.finding}" if claim.finding else "")
    cells = (paper, claim.text, claim.baseline, claim.measured, outcome)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


if __name__ == "__main__":
    main()
