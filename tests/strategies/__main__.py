"""The whole matrix of strategies: `python -m tests.strategies`, which `make proof` calls.

It writes benchmarks/results/strategies.json and the tables in docs/strategy-matrix.md. Named
strategies run alone, and replace their rows: `python -m tests.strategies FSDP2 "tensor parallel"`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path

from tests.strategies.cells import WORLDS, of
from tests.strategies.matrix import Outcome, alone, keep, run
from tests.strategies.ranks import quiet


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.strategies", description=__doc__)
    parser.add_argument("strategies", nargs="*", help="by default all", metavar="STRATEGY")
    chosen: list[str] = parser.parse_args().strategies
    if unknown := set(chosen) - WORLDS.keys():
        parser.error(f"strategies must be of {', '.join(WORLDS)}, got {', '.join(unknown)}")
    quiet()
    failed: list[Outcome] = []
    with tempfile.TemporaryDirectory() as directory:
        expected = alone(Path(directory))
        for compiled, strategy in product((False, True), chosen or WORLDS):  # the fast ones first
            cells = [cell for cell in of(strategy) if bool(cell.compiled) == compiled]
            world = 2 if compiled else WORLDS[strategy]
            outcomes = run(world, cells, Path(directory), expected)
            keep(outcomes)
            failed += [each for each in outcomes if each.result == "fails"]
            how = "compiled" if compiled else "eager"
            print(f"{strategy}, {how}: {summary(outcomes)}", flush=True)
    for each in failed:
        print(f"{each.cell}:\n{each.why}\n")
    return 1 if failed else 0


def summary(outcomes: list[Outcome]) -> str:
    """How many cells came to what."""
    results = [each.result for each in outcomes]
    return ", ".join(f"{results.count(each)} {each}" for each in sorted(set(results)))


if __name__ == "__main__":
    sys.exit(main())
