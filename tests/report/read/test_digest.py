"""The digest of the statistics against the whole table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fp.records import StatisticsWriter, read_statistics
from lightning_fp.report.read import digest as module
from lightning_fp.report.read.digest import RANKINGS, Digest, read_digest


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_statistics(run_dir).to_pylist()
    return [row for row in rows if row["operand"] != "output"]


def digest_of(run_dir: Path) -> Digest:
    found = read_digest(run_dir)
    assert found is not None
    return found


def worse(ranking: str, values: list[float]) -> float:
    return min(values) if ranking == "sqnr_db" else max(values)


@pytest.mark.parametrize("chunk", [7, 100, 2**20])
@pytest.mark.parametrize("columns", [3, 400])
def test_grids_have_the_worst_of_each_cell(
    made_up: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, columns: int
) -> None:
    monkeypatch.setattr(module, "_CHUNK_ROWS", chunk)
    monkeypatch.setattr(module, "COLUMNS", columns)
    found, rows = digest_of(made_up), rows_of(made_up)
    assert found.layers == tuple(dict.fromkeys(row["layer"] for row in rows))
    assert len(found.columns) == min(columns, 40)
    assert (found.columns[0][0], found.columns[-1][1]) == (16, 640)
    assert found.rows == len(rows)
    for ranking in RANKINGS:
        cells: dict[tuple[int, int], list[float]] = {}
        for row in rows:
            column = next(i for i, (a, b) in enumerate(found.columns) if a <= row["step"] <= b)
            place = found.layers.index(row["layer"]), column
            cells.setdefault(place, []).append(row[ranking])
        expected = torch.full(found.grids[ranking].shape, torch.nan)
        for place, values in cells.items():
            expected[place] = worse(ranking, values)
        torch.testing.assert_close(found.grids[ranking], expected, equal_nan=True, rtol=0, atol=0)


def test_layers_come_in_the_order_of_the_model(made_up: Path) -> None:
    found = digest_of(made_up)
    backwards = found.in_order(found.layers[::-1])
    assert backwards.layers == found.layers[::-1]
    assert torch.equal(backwards.formats, found.formats.flip(0))
    for ranking, grid in found.grids.items():
        assert torch.equal(backwards.grids[ranking].nan_to_num(-1), grid.flip(0).nan_to_num(-1))
    assert found.in_order([found.layers[-1]]).layers == (found.layers[-1], *found.layers[:-1])


def test_worst_cells_are_those_of_the_table(made_up: Path) -> None:
    found, rows = digest_of(made_up), rows_of(made_up)
    for ranking in RANKINGS:
        first = found.worst[ranking][0]
        assert first.value == worse(ranking, [row[ranking] for row in rows])
        for cell in found.worst[ranking]:
            own = [r for r in rows if (r["layer"], r["operand"]) == (cell.layer, cell.operand)]
            assert cell.value == worse(ranking, [row[ranking] for row in own])
            assert [r["step"] for r in own if r[ranking] == cell.value] == [cell.step]
    worst = found.worst["clamped_mass"][0]
    assert (worst.layer, worst.operand, worst.step) == ("model.blocks.1.up", "input", 352)


def test_totals_are_means_over_the_run(made_up: Path) -> None:
    found, rows = digest_of(made_up), rows_of(made_up)
    assert len(found.totals) == 12 * 3
    of = found.totals[5]
    own = [r for r in rows if (r["layer"], r["operand"]) == (of.layer, of.operand)]
    assert of.intervals == len(own) == 40
    for name in ("clamped_mass", "sqnr_db", "what_if_dynamic_underflow_fraction"):
        assert of.mean[name] == pytest.approx(sum(r[name] for r in own) / 40)
    assert of.mean["what_if_delayed_clamped_mass"] is None


def test_a_change_of_format_within_an_interval(tmp_path: Path) -> None:
    writer = StatisticsWriter(tmp_path)
    for step, formats in ((1, ["a"]), (2, ["a", "b"]), (3, ["b"]), (4, [])):
        writer.append(
            {
                "step": [step] * (len(formats) + 1),
                "layer": [*["x"] * len(formats), "y"],
                "operand": ["input"] * (len(formats) + 1),
                "format": [*formats, "c"],
                "clamped_mass": [0.1 * step] * len(formats) + [math.nan],
                "sqnr_db": [math.inf] * (len(formats) + 1),
            }
        )
    writer.flush()
    found = digest_of(tmp_path)
    names = [
        [found.format_names[code] if code >= 0 else None for code in row]
        for row in found.formats.tolist()
    ]
    assert names == [["a", "b", "b", None], ["c"] * 4]
    (history,) = found.histories
    assert history.steps == [1, 2, 3]
    assert history.values["clamped_mass"] == pytest.approx([0.1, 0.2, 0.3])
    assert history.formats == ["a", "a", "b", "b"]
    assert found.worst["sqnr_db"] == []  # nothing was lost


def test_the_sampled_steps(tmp_path: Path) -> None:
    row = {"operand": ["input"] * 2, "format": ["a"] * 2, "layer": ["x", "y"]}
    writer = StatisticsWriter(tmp_path)
    writer.append({"step": [8, 8], **row})  # of an earlier version
    writer.append({"step": [16, 16], **row, "sampled_at": ["", "11"]})
    writer.append({"step": [24, 24], **row, "sampled_at": ["17 21", "21"]})
    writer.flush()
    assert digest_of(tmp_path).sampled_at.tolist() == [11, 17, 21]


def test_no_statistics_and_none_yet(tmp_path: Path) -> None:
    assert read_digest(tmp_path) is None
    StatisticsWriter(tmp_path)
    assert read_digest(tmp_path) is None
