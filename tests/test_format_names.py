"""The one table of formats: complete, without torch, and what others look up in it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lightning_fp import choices, format_names
from lightning_fp.choices import unknown
from lightning_fp.format_names import CANONICAL, LADDER, TABLE, TE_FORMATS, base_row


@pytest.mark.parametrize("module", [format_names, choices])
def test_it_imports_nothing_heavy(module: object) -> None:
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({str(Path(str(module.__file__)))!r})\n"
        "print(sorted({'torch', 'lightning', 'torchao', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_name_means_one_format() -> None:
    counts = Counter(name for row in TABLE for name in (row.name, *row.aliases))
    assert set(counts.values()) == {1}
    assert all(row.help for row in TABLE)
    assert CANONICAL["mx"] == CANONICAL["fp8-mx"] == "mxfp8"


def test_each_scaled_name_is_read_with_and_without_its_prefix() -> None:
    """But for nvfp4, whose name has none."""
    for row in TABLE:
        if row.name.startswith("fp8-"):
            assert row.name.removeprefix("fp8-") in row.aliases


def test_the_ladder_is_in_its_order() -> None:
    assert LADDER == ("fp8-delayed", "fp8-dynamic", "fp8-rowwise", "fp8-rowwise-gw-hp")


def test_a_format_with_changes_shares_a_row() -> None:
    assert base_row("dynamic", "row").name == "fp8-rowwise"
    assert base_row("none", "tensor").name == "high"
    assert [name for name, te in TE_FORMATS.items() if te.tokens != 8] == ["mxfp8", "nvfp4"]


def test_an_unknown_name_is_refused_with_what_was_meant() -> None:
    error = unknown("backend", "torcho", ("auto", "torchao"), other=" or a kernel")
    message = "backend must be one of auto, torchao or a kernel, got 'torcho'"
    assert str(error) == f"{message}; did you mean 'torchao'?"
    assert str(unknown("backend", "x", ("auto",))) == "backend must be one of auto, got 'x'"
    assert str(unknown("n", "delaed", ("a",), aliases=("delayed",))).endswith("mean 'delayed'?")
