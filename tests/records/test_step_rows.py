"""Rows by step: what was written comes back, whatever happened to the run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_fp.records.step_rows import StepRows, read_step_rows

COLUMNS = ("step", "a", "b")
VALUES = st.one_of(st.none(), st.floats(allow_nan=False))


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(written=st.lists(st.tuples(st.integers(0, 30), VALUES, VALUES), max_size=40))
def test_the_last_word_on_each_step(tmp_path: Path, written: list[tuple]) -> None:
    path = tmp_path / "rows.csv"
    path.unlink(missing_ok=True)
    StepRows(path, COLUMNS).append(written)
    expected: list[tuple] = []
    for row in written:
        expected = [*(old for old in expected if old[0] < row[0]), row]
    read = [tuple(row.values()) for row in read_step_rows(path, COLUMNS).to_pylist()]
    assert read == expected
    assert path.is_file() == bool(written)


def test_what_is_not_finite_is_not_what_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    StepRows(path, COLUMNS).append([(1, math.nan, None), (2, math.inf, -math.inf)])
    first, second = read_step_rows(path, COLUMNS).to_pylist()
    assert math.isnan(first["a"])
    assert first["b"] is None
    assert (second["a"], second["b"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("text", [None, "", "step,a", "step,a,b\n", "step,a,b\n1,2.0"])
def test_nothing_yet(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "rows.csv"
    if text is not None:
        path.write_text(text)
    table = read_step_rows(path, COLUMNS)
    assert table.column_names == list(COLUMNS)
    assert len(table) == 0


def test_another_processs_rows_follow(tmp_path: Path) -> None:
    path = tmp_path / "run" / "rows.csv"
    StepRows(path, COLUMNS).append([(1, 0.1, None)])
    path.write_text(path.read_text() + "2,0.")
    StepRows(path, COLUMNS).append([(2, 0.3, None)])
    assert path.read_text() == "step,a,b\n1,0.1,\n2,0.3,\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,loss\n1,2\n", "must have the columns step, a, b, got step, loss"),
        ("step,a,b\nx,1,2\n", "cannot be read"),
        ("step,a,b\n1,2\n", "cannot be read"),
    ],
)
def test_another_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_step_rows(path, COLUMNS)
