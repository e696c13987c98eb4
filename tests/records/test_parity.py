"""Probes as a table."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lightning_fp.records import read_parity
from lightning_fp.records.parity import FILE, SCHEMA


def probe(step: int, gap: float | None = 0.25) -> str:
    layer: dict[str, Any] = {"format": "fp8-delayed", "cosine": 0.99, "norm_ratio": 1.01}
    layer |= {"cast_error": 0.05, "removed_error": None, "removed_loss_gap": None}
    line: dict[str, Any] = {"step": step, "seconds": 1.5, "loss": 2.0, "loss_gap": gap}
    line |= {"grad_cosine": 0.9, "grad_norm_ratio": 1.0, "grad_error": 0.1, "noise": 0.0}
    line["layers"] = [{"layer": name, **layer} for name in "ab"]
    return json.dumps(line) + "\n"


def test_one_row_per_probe_and_layer(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(probe(3) + probe(17, None))
    table = read_parity(tmp_path)
    assert table.schema.equals(SCHEMA)
    assert table["step"].to_pylist() == [3, 3, 17, 17]
    assert table["layer"].to_pylist() == ["a", "b"] * 2
    assert table["loss_gap"].to_pylist() == [0.25, 0.25, None, None]
    assert table["cosine"].to_pylist() == [0.99] * 4
    assert table["removed_error"].null_count == 4


def test_a_resumed_run_replaces_what_it_left(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(probe(3) + probe(17) + probe(30) + probe(17, 0.5))
    table = read_parity(tmp_path)
    assert table["step"].to_pylist() == [3, 3, 17, 17]
    assert table["loss_gap"].to_pylist() == [0.25, 0.25, 0.5, 0.5]


def test_a_crash_tears_at_most_the_last_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_text(probe(3) + probe(17)[:40])
    assert read_parity(tmp_path)["step"].to_pylist() == [3, 3]
    (tmp_path / FILE).write_text(probe(3) + '{"step": 5}\n' + probe(17))
    with caplog.at_level(logging.WARNING):
        assert read_parity(tmp_path)["step"].to_pylist() == [3, 3, 17, 17]
    assert "line 2 of" in caplog.text


def test_no_probes(tmp_path: Path) -> None:
    assert read_parity(tmp_path).num_rows == 0
    assert read_parity(tmp_path).schema.equals(SCHEMA)
