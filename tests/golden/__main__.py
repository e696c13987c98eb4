"""python -m tests.golden record | check [--only NAMES] [--traces DIRECTORY], or names."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

from tests.golden import cases, store


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("record", "write the traces of this revision"),
        ("check", "compare this revision with the traces that were written"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--only", nargs="+", choices=cases.GOLDEN, default=[*cases.GOLDEN])
        command.add_argument("--traces", type=Path, default=store.TRACES, help="where they are")
    commands.add_parser("names", help="write the list of public names")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_fp").setLevel(logging.CRITICAL)
    if options.command == "names":
        from tests.golden import names

        names.FILE.write_text(names.listed())
        return 0
    act = _record if options.command == "record" else _check
    return max([act(name, options.traces) for name in options.only], default=0)


def _record(name: str, directory: Path) -> int:
    start = time.monotonic()
    trace = cases.run_case(name)
    store.write(name, trace, directory)
    print(f"{name}: {len(trace['events'])} events, {time.monotonic() - start:.1f} s", flush=True)
    return 0


def _check(name: str, directory: Path) -> int:
    if reason := store.not_comparable(name, directory):
        print(f"{name}: {reason}", flush=True)
        return 1
    found = store.check(name, cases.run_case(name), directory)
    print(f"{name}: {found or 'the same'}", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
