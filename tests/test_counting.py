"""One is one, and several are several."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_fp.counting import counted

PACKAGE = Path(__file__).parents[1] / "lightning_fp"


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 layers"), (1, "1 layer"), (2, "2 layers"), (1234, "1,234 layers")]
)
def test_singular_and_plural(number: int, said: str) -> None:
    assert counted(number, "layer") == said


def test_a_plural_of_its_own() -> None:
    assert [counted(n, "batch", "batches") for n in (1, 2)] == ["1 batch", "2 batches"]


def test_numbers_of_layers_are_counted() -> None:
    """A number before the word, and no `of` before that, could be 1."""
    bare = re.compile(r"(?<! of )\{[^{}]*\blen\([^{}]*\}(?: more)? (?:layers|operands|groups)\b")
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if bare.search(line) and "== 1 else" not in line
    ]
    assert found == []
