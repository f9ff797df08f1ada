"""The fault, load and bad-input batteries: which test covers which case, and how it ended when it was last run.

A test says what it covers with ``@pytest.mark.battery("F2")``; what comes out of the case is the first sentence of its
docstring, or its name. This script finds them all and keeps the table of docs/reliability.md.

    python tests/battery.py --check         the table is that of the tests, and every case has one
    python tests/battery.py --write         write the table
    python tests/battery.py --run [--slow] [PART …]
                                            run the tests, or those with a PART in their names, note how each ended,
                                            write the table
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "reliability.md"
RESULTS = TESTS.parent / "benchmarks" / "results" / "battery.json"
BEGIN, END = "<!-- battery: made by tests/battery.py -->", "<!-- battery ends -->"

CASES = {
    "F1": "kill -9 the server at any instant of a round",
    "F2": "kill clients",
    "F3": "a partition; duplicates; answers out of order",
    "F4": "a client or a link that is too slow",
    "F5": "a disk that is full, read-only or damaged",
    "F6": "SIGTERM, once and twice",
    "F7": "a clock that is off by ten minutes",
    "F8": "a worker of the simulation that dies",
    "F9": "client code that raises, hangs, prints, leaks a thread",
    "F10": "containers: any user, read-only root, restarts",
    "F11": "all clients gone",
    "L1": "200 clients, 1 MB each, 100 rounds",
    "L2": "10,000 registered, 100 a round",
    "L3": "four updates of 500 MB at once",
    "L4": "1,000 rounds",
    "L5": "500 connects in a second",
    "L6": "50 peers that read a kilobyte a second",
    "B1": "arrays: not finite, wrong names, shapes, types, sizes that lie",
    "B2": "weights: zero, negative, not finite, huge, no number",
    "B3": "updates: huge norm, sign flip, constant, the model itself",
    "B4": "pickles, archives, bombs",
    "B5": "payloads: too large, lying lengths, chunks missing, repeated, swapped, of another run",
    "B6": "credentials: none, wrong, revoked, expired, replayed; TLS off, old, for another host",
    "B7": "protocol: never asked, closed, twice, another's id, wrong version, cut at any byte",
    "B8": "mutated and random frames",
    "B11": "code that was not allowed",
}
ELSEWHERE: dict[str, str] = {
    "F10": "Beyond these, `make images-check` runs fleets of the images (docs/deploy.md); it needs a container engine.",
}


@dataclass(frozen=True)
class Test:
    """A test of the batteries.

    Attributes:
        name: ``file::function``, the file relative to ``tests``.
        slow: whether it runs by ``make test-slow`` only.
        outcome: what comes out of the case, in a line.
    """

    name: str
    slow: bool
    outcome: str


def collect() -> dict[str, list[Test]]:
    """Return the tests of every case, in the order of files and lines."""
    found: dict[str, list[Test]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            marks = {ast.unparse(mark).partition("(")[0]: mark for mark in node.decorator_list}
            battery = marks.get("pytest.mark.battery")
            if not isinstance(battery, ast.Call):
                continue
            said = ast.get_docstring(node) or f"{node.name.removeprefix('test_').replace('_', ' ').capitalize()}."
            outcome = re.sub(r"^[FLB]\d+:? ", "", " ".join(said.split("\n\n")[0].split()))
            outcome = outcome[0].upper() + outcome[1:]
            test = Test(f"{path.relative_to(TESTS)}::{node.name}", "pytest.mark.slow" in marks, outcome)
            for case in battery.args:
                found[ast.literal_eval(case)].append(test)
    return found


def problems(found: dict[str, list[Test]]) -> list[str]:
    """Return what is wrong with the marks."""
    unknown = [f"{case} is no case of the batteries" for case in found if case not in CASES]
    return unknown + [f"no test is marked {case}: {said}" for case, said in CASES.items() if case not in found]


def table(found: dict[str, list[Test]]) -> str:
    """Return the page's table."""
    ended = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = ["| case | test | tier | outcome | last run |", "|---|---|---|---|---|"]
    for case, said in CASES.items():
        rows.append(f"| **{case}** {said} | | | {ELSEWHERE.get(case, '')} | |")
        for test in found.get(case, []):
            file, _, function = test.name.partition("::")
            tier, end = "slow" if test.slow else "fast", ended.get(test.name, {}).get("ended", "–")
            outcome = test.outcome.replace("|", "\\|")
            rows.append(f"| | [`{function.removeprefix('test_')}`](../tests/{file}) | {tier} | {outcome} | {end} |")
    return "\n".join(rows)


def page(found: dict[str, list[Test]]) -> str:
    """Return the whole page with the table as it should be."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE} has no place for the table"
    return f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}"


def run(found: dict[str, list[Test]], slow: bool, parts: list[str]) -> int:
    """Run the tests and note how each ended; return pytest's exit status."""
    names = {test.name for tests in found.values() for test in tests if slow or not test.slow}
    names = {name for name in names if not parts or any(part in name for part in parts)}
    if not names:
        raise SystemExit(f"no test of the batteries has {' or '.join(parts)} in its name")
    known: dict[str, dict[str, object]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        report, paths = Path(folder) / "report.xml", [str(TESTS / name) for name in sorted(names)]
        chosen = ["-m", "battery"] if slow else []
        arguments = ["-q", *chosen, "--timeout", "1800", f"--junitxml={report}", *paths]
        status = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=TESTS.parent, check=False).returncode
        noted: dict[str, dict[str, object]] = {}
        for each in ElementTree.parse(report).iter("testcase"):
            file = each.get("classname", "").removeprefix("tests.").replace(".", "/") + ".py"
            name = f"{file}::{each.get('name', '').partition('[')[0]}"
            bad = [kind for kind in ("failure", "error", "skipped") if each.find(kind) is not None]
            end = {"failure": "failed", "error": "failed", "skipped": "skipped"}[bad[0]] if bad else "passed"
            before = noted.setdefault(name, {"ended": end, "seconds": 0.0})
            if end == "failed" or before["ended"] == "passed":
                before["ended"] = end
            before["seconds"] = round(float(str(before["seconds"])) + float(each.get("time", 0)), 1)
    everything = {test.name for tests in found.values() for test in tests}
    kept = {name: said for name, said in (known | noted).items() if name in everything}
    RESULTS.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    return status


def main(arguments: list[str]) -> int:
    found = collect()
    if wrong := problems(found):
        sys.stderr.write("\n".join(wrong) + "\n")
        return 1
    parts = [each for each in arguments if not each.startswith("-")]
    status = run(found, "--slow" in arguments, parts) if "--run" in arguments else 0
    if "--check" in arguments:
        if PAGE.read_text() != page(found):
            sys.stderr.write(f"{PAGE} is not what the tests say: python tests/battery.py --write\n")
            return 1
    else:
        PAGE.write_text(page(found))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
