"""One of two ranks with gloo, of the case "two-ranks"."""

from __future__ import annotations

import json
from pathlib import Path

from tests.golden.cases import rank_trace
from tests.two_ranks import one_of_two_ranks


def main(directory: Path) -> None:
    with one_of_two_ranks(directory, seconds=600) as rank:
        told = rank_trace(directory, rank)
        (directory / f"rank{rank}.json").write_text(json.dumps(told))
