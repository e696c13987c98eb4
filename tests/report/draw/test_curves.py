"""Curves and marks: few enough to draw, and nothing that matters is lost."""

from __future__ import annotations

import math

import torch

from lightning_fp.report.draw.curves import curve, panel
from lightning_fp.report.draw.heatmaps import grouped_rows


def test_a_spike_of_one_step_stays() -> None:
    values = torch.ones(100_000)
    values[61_803] = 50.0
    line = curve("loss", torch.arange(1, 100_001), values, smooth=True)
    assert len(line["steps"]) == len(line["values"]) == len(line["low"]) <= 1000
    assert max(line["high"]) == 50
    at = line["high"].index(50)
    assert abs(line["steps"][at] - 61_804) <= 100
    assert max(line["smooth"]) < 1.1


def test_few_points_are_drawn_as_they_are() -> None:
    line = curve("loss", torch.tensor([1, 2, 3]), torch.tensor([1.0, math.nan, math.inf]))
    assert line["values"] == [1.0, None, None]
    assert line["bad"] == [2, 3]
    assert "low" not in line


def test_a_stretch_without_a_finite_value_is_a_gap() -> None:
    values = torch.ones(4000)
    values[:8] = math.nan
    line = curve("loss", torch.arange(4000), values)
    assert line["values"][:3] == [None, None, 1.0]
    assert line["high"][0] is None


def test_axes_are_logarithmic_where_values_differ_by_orders_of_magnitude() -> None:
    def log(*values: float) -> bool:
        line = curve("", torch.arange(len(values)), torch.tensor(values))
        return panel("", [line])["log"]

    assert log(1, 100)
    assert not log(1, 5)
    assert not log(0, 100)


def test_neighbouring_layers_share_a_row_of_a_heatmap() -> None:
    grid = torch.tensor([[1.0, torch.nan], [2.0, torch.nan], [3.0, 0.5]])
    rows, labels = grouped_rows(grid, ["a", "b", "c"], lowest=False, most=2)
    assert labels == ["a to b", "c"]
    assert rows.nan_to_num(-1).tolist() == [[2.0, -1.0], [3.0, 0.5]]
    lowest, _ = grouped_rows(grid, ["a", "b", "c"], lowest=True, most=2)
    assert lowest[0, 0] == 1
    assert grouped_rows(grid, ["a", "b", "c"], lowest=True)[1] == ["a", "b", "c"]
