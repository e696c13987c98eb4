"""From sums to rows: which columns a row has, by format and operand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_fp.layers import linear_format
from lightning_fp.layers.histories.scale_history import AmaxRecord
from lightning_fp.layers.statistics_table import OPERANDS
from lightning_fp.numerics import COLUMN, STATISTICS
from lightning_fp.records import Sampled, StatisticsRows, statistics_rows

NOTHING = AmaxRecord([], [], torch.zeros(0, 3, 4))


def sampled(*formats: str, steps: int = 2, **sums: float) -> Sampled:
    """One layer of each format, called after it."""
    values = torch.zeros(len(formats), len(OPERANDS), len(STATISTICS), dtype=torch.float64)
    for name, value in {"numel": 10, "amax": 2.0, **sums}.items():
        values[..., COLUMN[name]] = value
    count = torch.full((len(formats),), steps)
    return Sampled(list(formats), [linear_format(name) for name in formats], values, count)


def watched(layers: list[str], values: list[float]) -> AmaxRecord:
    format = linear_format("fp8-delayed")
    repeated = torch.tensor(values).expand(len(layers), 3, 4)
    return AmaxRecord(layers, [format] * len(layers), repeated)


def find(rows: StatisticsRows, layer: str, operand: str = "input") -> dict[str, Any]:
    (index,) = (
        i
        for i, key in enumerate(zip(rows.layers, rows.operands, strict=True))
        if key == (layer, operand)
    )
    return {name: column[index].item() for name, column in rows.values.items()}


@pytest.mark.parametrize(
    ("format", "operand", "scale", "headroom"),
    [
        ("fp8-dynamic", "input", 224, 0),
        ("fp8-dynamic", "grad_output", 57344 / 2, 0),
        ("fp8-rowwise", "input", 128, math.log2(448 / 256)),
        ("fp8-block", "grad_output", 224, 0),
        ("mxfp8", "input", 128, math.log2(448 / 256)),
        ("e4m3", "input", 1, math.log2(448 / 2)),
        ("fp8-delayed", "input", math.nan, math.nan),  # nothing was watched
        ("fp8-dynamic", "output", math.nan, math.nan),
    ],
)
def test_scale_and_headroom(format: str, operand: str, scale: float, headroom: float) -> None:
    row = find(statistics_rows([sampled(format)], NOTHING), format, operand)
    assert row["scale"] == pytest.approx(scale, nan_ok=True)
    assert row["headroom_bits"] == pytest.approx(headroom, nan_ok=True, abs=1e-6)


def test_layers_in_high_precision_have_no_rows() -> None:
    assert not len(statistics_rows([sampled("bf16")], NOTHING))


def test_nothing_at_all() -> None:
    rows = statistics_rows([], NOTHING)
    assert len(rows) == 0
    assert rows.columns(7)["layer"] == []


def test_steps_in_the_same_format_are_one_row() -> None:
    parts = [sampled("e4m3", steps=2, clamped=1), sampled("e4m3", steps=3, clamped=4, amax=9.0)]
    rows = statistics_rows(parts, NOTHING)
    row = find(rows, "e4m3")
    assert (row["sampled_steps"], row["numel"], row["amax"]) == (5, 20, 9)
    assert row["clamped_fraction"] == 5 / 20
    assert rows.columns(7)["sampled_at"] == [""] * len(OPERANDS)


def test_rows_say_which_steps_were_sampled() -> None:
    parts = [
        replace(sampled("e4m3"), at=(1, 5)),
        replace(sampled("e4m3", "fp8-delayed"), at=(9,)),
        replace(sampled("bf16"), at=(11,)),
    ]
    rows = statistics_rows(parts, watched(["a"], [7.0, math.inf, 0.0, 0.0]))
    columns = rows.columns(12)
    found = dict(zip(rows.layers, columns["sampled_at"], strict=True))
    assert found == {"e4m3": "1 5 9", "fp8-delayed": "9", "a": ""}
    assert columns["sampled"] == [bool(at) for at in columns["sampled_at"]]


def test_the_output_is_not_cast() -> None:
    row = find(statistics_rows([sampled("e4m3", signal=1, noise=0.01)], NOTHING), "e4m3", "output")
    assert row["sqnr_db"] == pytest.approx(20)
    assert math.isnan(row["clamped_mass"])
    assert math.isnan(row["underflow_fraction"])


class TestWatched:
    def test_every_step_counts(self) -> None:
        part = sampled("fp8-delayed", nonfinite=1)
        rows = statistics_rows([part], watched(["fp8-delayed"], [7.0, -1.5, 3.0, 64.0]))
        row = find(rows, "fp8-delayed")
        assert (row["amax"], row["headroom_bits"], row["nonfinite"]) == (7, -1.5, 3)
        assert (row["scale"], row["sampled_steps"]) == (64, 2)

    def test_without_a_sampled_step(self) -> None:
        rows = statistics_rows([], watched(["a"], [7.0, math.inf, 0.0, 0.0]))
        assert rows.operands == ["input", "weight", "grad_output"]
        row = find(rows, "a")
        assert row["sampled_steps"] == 0
        assert math.isnan(row["clamped_mass"])
        assert math.isnan(row["headroom_bits"])

    def test_a_layer_that_left_and_came_back(self) -> None:
        both = AmaxRecord(
            ["a", "a"],
            [linear_format("fp8-delayed")] * 2,
            torch.stack(
                [
                    torch.tensor([5.0, -2.0, 1.0, 8.0]).expand(3, 4),
                    torch.tensor([3.0, 1.0, 4.0, 16.0]).expand(3, 4),
                ]
            ),
        )
        row = find(statistics_rows([], both), "a")
        assert (row["amax"], row["headroom_bits"], row["nonfinite"]) == (5, -2, 5)
        assert row["scale"] == 16

    def test_of_a_dynamic_layer_whose_history_is_kept(self) -> None:
        """Its amax is exact; scale and headroom are its own, not those of the history."""
        part = sampled("fp8-dynamic", amax=2.0)
        seen = AmaxRecord(
            part.layers, part.formats, torch.tensor([4.0, -1.0, 0.0, 9.0]).expand(1, 3, 4)
        )
        row = find(statistics_rows([part], seen), "fp8-dynamic")
        assert (row["amax"], row["scale"], row["headroom_bits"]) == (4, 112, 0)


def test_what_if_columns_only_where_asked() -> None:
    plain = statistics_rows([sampled("fp8-dynamic")], NOTHING)
    assert not any(name.startswith("what_if") for name in plain.values)
    asked = sampled("fp8-dynamic", size=10, sampled_nonzero=8, rowwise_underflow=2)
    row = find(statistics_rows([asked], NOTHING), "fp8-dynamic")
    assert row["what_if_rowwise_underflow_fraction"] == 0.25
    assert "what_if_delayed_clamped_mass" not in row  # there was no history


def test_the_spread_of_scales_only_where_there_are_several() -> None:
    assert "scale_spread_bits" not in statistics_rows([sampled("fp8-dynamic")], NOTHING).values
    # scales of 2, 8, 8, 2: one bit around the mean of two
    part = sampled("fp8-block", scales=4, log_scale=8, log_scale_squared=20)
    rows = statistics_rows([part, sampled("fp8-dynamic")], NOTHING)
    assert find(rows, "fp8-block")["scale_spread_bits"] == 1
    assert math.isnan(find(rows, "fp8-block", "output")["scale_spread_bits"])
    assert math.isnan(find(rows, "fp8-dynamic")["scale_spread_bits"])
