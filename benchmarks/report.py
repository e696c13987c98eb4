"""What the report of a long run of a large model takes: 1,000 layers, 2,000 intervals."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from side_by_side import report

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.report.large_run import write_large_run
from tests.report.test_large import measure

LAYERS, INTERVALS = 1000, 2000


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        run = write_large_run(Path(directory, "run"), layers=LAYERS, intervals=INTERVALS)
        seconds, peak, size = measure(run, Path(directory, "report.html"))
    of = f"{LAYERS:,} layers x 3 operands, {INTERVALS:,} intervals"
    report(
        [
            (f"seconds of processor time for the report of {of}", seconds, "<=", 20),
            ("GB of memory at most, torch and all included", peak / 1e9, "<=", 1),
            ("MB of HTML", size / 1e6, "<=", 15),
        ]
    )


if __name__ == "__main__":
    main()
