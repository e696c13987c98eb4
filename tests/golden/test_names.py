"""What users import stays where it is, and is called as it was."""

from __future__ import annotations

import difflib

import pytest

from tests.golden import names


def test_public_names_are_those_that_were_recorded() -> None:
    before, now = names.FILE.read_text().splitlines(), names.listed().splitlines()
    changed = [line for line in difflib.ndiff(before, now) if line[0] in "-+"]
    assert not changed, (
        "public names or their signatures have changed:\n"
        + "\n".join(changed)
        + "\nIf this is meant, add a line to CHANGELOG.md and record anew: python -m tests.golden"
        " names"
    )


def test_imports_are_found_in_every_form() -> None:
    text = """
>>> from lightning_fp import (
...     Gate,  # one
...     Stage as S,
... )
# or: import lightning_fp.register; L.Trainer(precision="fp16")
from lightning_fp.records import read_events, read_loss
    - class_path: lightning_fp.FP8Precision
"""
    assert list(names.used(text)) == [
        "lightning_fp.Gate",
        "lightning_fp.Stage",
        "lightning_fp.records.read_events",
        "lightning_fp.records.read_loss",
        "lightning_fp.register",
        "lightning_fp.FP8Precision",
    ]


def test_a_signature_is_as_it_is_written() -> None:
    def function(a: int, *, b: Gate | None = None, **c: str) -> list[Gate]:  # noqa: F821
        raise NotImplementedError

    assert names.signature(function) == "(a: int, *, b: Gate | None = None, **c: str) -> list[Gate]"


def test_a_name_that_is_gone_is_told() -> None:
    with pytest.raises(ImportError, match=r"lightning_fp\.records\.read_dreams"):
        names.resolved("lightning_fp.records.read_dreams")
