"""Run some parts in this process; `lane.py` calls it."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path

from parts.rows import NotHereError, OutOfTimeError, Rows


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    failed = 0
    for name in options.names:
        began = time.monotonic()
        rows = Rows(options.out / f"{name}.jsonl", part=name, deadline=deadline)
        status, reason = "done", ""
        try:
            from parts.card import find_card

            importlib.import_module(f"parts.{name}").measure(find_card(dry=options.dry), rows)
        except NotHereError as skip:
            status, reason = "skipped", str(skip)
        except ImportError as error:
            status, reason = "skipped", f"needs {error.name or error}: {error}"
        except OutOfTimeError:
            status, reason = "out of time", "the rows above are all there was time for"
        except Exception as error:  # one part must not take the others with it
            traceback.print_exc()
            status, reason = "failed", f"{type(error).__name__}: {error}"
            failed = 1
        rows.end(status, reason, seconds=time.monotonic() - began)
    return failed


if __name__ == "__main__":
    sys.exit(main())
