"""Lines of JSON: what is appended is read, by strict readers too, whatever was cut short before."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fp.records.jsonl import append_line, json_text, plain, read_lines
from lightning_fp.records.resume import in_force, rows_in_force

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@given(values)
@settings(max_examples=200, deadline=None)
def test_a_strict_reader_takes_anything(value: Any) -> None:
    assert strict(json_text(value)) == plain(value)
    assert strict(json.dumps(plain(value, names=True))) == plain(value, names=True)


@given(st.floats())
def test_numbers_come_back(value: float) -> None:
    assert repr(float(plain(value, names=True))) == repr(value)
    assert plain(value) is (value if math.isfinite(value) else None)


@given(st.lists(st.integers(0, 6), max_size=12))
def test_a_later_row_replaces_those_from_its_step_on(steps: list[int]) -> None:
    kept: list[tuple[int, int]] = []
    for index, step in enumerate(steps):
        kept = [*((at, i) for at, i in kept if at < step), (step, index)]
    assert rows_in_force(list(zip(steps, range(12), strict=False)), lambda row: row[0]) == kept
    assert in_force(steps).sum() == len(kept)


def test_lines_with_their_positions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    assert read_lines(path, dict) == []
    append_line(path, {"a": math.inf, "path": Path("x")})
    append_line(path, {"a": (1, 2)})
    first = len(path.read_bytes().splitlines(keepends=True)[0])
    assert read_lines(path, dict) == [(0, {"a": "inf", "path": "x"}), (first, {"a": [1, 2]})]


def test_what_cannot_be_read_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff\n{"b": 2}\n[3]\n\n{"a": 4')
    append_line(path, {"a": 5})
    path.write_bytes(path.read_bytes() + b'{"a": 6}')  # whole, but who knows
    with caplog.at_level(logging.WARNING):
        assert [a for _, a in read_lines(path, lambda line: line["a"])] == [1, 5]
    said = [record.getMessage() for record in caplog.records]
    assert [text.partition(" of ")[0] for text in said] == [f"line {n}" for n in (2, 3, 4, 6, 8)]
    assert "its end is missing" in said[-1]
