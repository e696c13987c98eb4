"""Lightning's own tests with our plugin in every Trainer that names no precision.

Each test that makes such a Trainer runs in formats `high` and `fp8-dynamic`, with and without a
`PrecisionFallback`; what fails runs once more with plain Lightning. The table that is written is
part of docs/compatibility.md. Needs what Lightning's tests need (requirements/pytorch/test.txt of
the checkout); what is missing fails with plain Lightning too. An interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from tests.peer.comparison import BAD, compared
from tests.peer.suite import ARMS, PLAIN, ROOT, Suite

TABLE = ROOT / "benchmarks" / "results" / "peer_suite.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python dev.py peer-suite", description=__doc__)
    parser.add_argument("path", type=Path, help="a checkout of Lightning's repository")
    parser.add_argument("--results", type=Path, help="where results are kept, to go on from there")
    parser.add_argument("--python", default=sys.executable, help="with what Lightning's tests need")
    parser.add_argument("--timeout", type=float, default=150, help="seconds for one test")
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS[1:]])
    parser.add_argument("--rooms", nargs="+", help="only these directories of tests_pytorch")
    parser.add_argument("--without", help="leave out tests in whose names this expression is found")
    parser.add_argument("--compare", action="store_true", help="run nothing, compare what there is")
    options = parser.parse_args()
    results = options.results or Path(tempfile.gettempdir()) / "lightning_fp_peer_suite"
    suite = Suite(
        options.path,
        results,
        python=options.python,
        timeout=options.timeout,
        only=options.rooms,
        without=options.without,
    )
    arms = [arm for arm in ARMS[1:] if options.arms is None or arm.name in options.arms]
    if not options.compare:
        run(suite, [arm.name for arm in arms])
    tests = (options.path / "src" / "version.info").read_text().strip()
    by_arm = {arm.name: suite.read(arm) for arm in ARMS}
    rows = compared(by_arm)
    table = {
        "tests_of": tests,
        "lightning": version("lightning"),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "scope": scope(suite, {test for tests in by_arm.values() for test in tests}),
        "arms": rows,
    }
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    for row in rows:
        print(f"{row['name']}: {row['tests']} tests, {row['differ']} differ from plain Lightning")
        for each in row["differences"]:
            print(f"  {each['test']}: {each['reason']}")
    return 1 if any(row["differ"] for row in rows if row["name"] == "high") else 0


def run(suite: Suite, chosen: list[str]) -> None:
    """The first arm shows which tests make a Trainer; the others run those."""
    by_name = {arm.name: arm for arm in ARMS}
    first, *others = [by_name[name] for name in chosen]
    suite.run(first)
    results = suite.read(first).values()
    made = [r.test for r in results if r.trainers and r.outcome not in ("skipped", "xfailed")]
    for arm in others:
        suite.run(arm, only=made)
    bad = {
        r.test for name in chosen for r in suite.read(by_name[name]).values() if r.outcome in BAD
    }
    suite.run(by_name[PLAIN], only=sorted(bad))


def scope(suite: Suite, tests: set[str]) -> str:
    """Which part of the suite was run."""
    rooms = {test.split("/")[0].split("::")[0] for test in tests}
    missing = [room for room in suite.all_rooms() if room not in rooms]
    without = f" Left out: tests of the name `{suite.without.pattern}`." if suite.without else ""
    if not missing:
        return f"All of its directories were run.{without}"
    return (
        f"Run so far, in whole or in part: {', '.join(sorted(rooms))};"
        f" not run: {', '.join(missing)}.{without}"
    )


if __name__ == "__main__":
    sys.exit(main())
