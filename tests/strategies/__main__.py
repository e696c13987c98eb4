"""The whole matrix of strategies: `python -m tests.strategies`, which `make proof` calls.

It writes benchmarks/results/strategies.json and the tables in docs/strategy-matrix.md, a few cells
at a time, so that little is lost if it is ended: `--missing` runs the cells that have no result.
Named strategies run alone, and replace their rows: `python -m tests.strategies FSDP2 "tensor
parallel"`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path

from tests.strategies.cells import WORLDS, Cell, of
from tests.strategies.matrix import Outcome, alone, cell_in, keep, kept, run
from tests.strategies.ranks import quiet

AT_A_TIME = 16
"""Cells that one set of processes trains."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.strategies", description=__doc__)
    parser.add_argument("strategies", nargs="*", help="by default all", metavar="STRATEGY")
    parser.add_argument("--missing", action="store_true", help="only cells that have no result")
    options = parser.parse_args()
    chosen: list[str] = options.strategies
    if unknown := set(chosen) - WORLDS.keys():
        parser.error(f"strategies must be of {', '.join(WORLDS)}, got {', '.join(unknown)}")
    quiet()
    known = {cell_in(row) for row in kept()} if options.missing else set[Cell]()
    failed: list[Outcome] = []
    with tempfile.TemporaryDirectory() as directory:
        expected = alone(Path(directory))
        for compiled, strategy in product((False, True), chosen or WORLDS):  # the fast ones first
            cells = [c for c in of(strategy) if bool(c.compiled) == compiled and c not in known]
            world = 2 if compiled else WORLDS[strategy]
            for first in range(0, len(cells), AT_A_TIME):
                some = cells[first : first + AT_A_TIME]
                outcomes = run(world, some, Path(directory), expected)
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
