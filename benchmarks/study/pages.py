"""Tables on pages of the docs, between markers that a command writes between."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_fp.study.intervals import wilson


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- begin name -->` and `<!-- end name -->`.

    Raises:
        ValueError: if the page has no such markers.
    """
    before = page.read_text(encoding="utf-8")
    markers = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not markers.search(before):
        raise ValueError(f"{page.name} has no place for {name}")
    page.write_text(markers.sub(lambda m: f"{m[1]}\n{text}\n{m[2]}", before), encoding="utf-8")


def rate(hits: int, runs: int) -> str:
    """A rate with its interval: "2/5 [12%, 77%]"."""
    low, high = wilson(hits, runs)
    return f"{hits}/{runs} [{low:.0%}, {high:.0%}]"
