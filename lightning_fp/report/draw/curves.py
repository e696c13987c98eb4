"""Curves for the charts: no more points than a screen has columns, and no spike lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fp.report.draw.parts import Chart

_POINTS = 1000
"""Points of a curve at most."""

_WIDE = 30.0
"""Ratio of largest to smallest value from which on an axis is logarithmic."""


GREY, INK = -1, -2
"""In place of a number in the palette: for what a run is compared with."""

_APART = (0, 3, 5, 6, 7)
"""Numbers in the palette of blues and violets: orange, green and amber say how something went."""


def told_apart(number: int) -> int:
    """A colour that only tells one thing from another, by its number."""
    return _APART[number % len(_APART)]


def curve(
    name: str,
    steps: Tensor,
    values: Tensor,
    *,
    color: int = 0,
    smooth: bool = False,
    last: float | None = None,
    dotted: bool = False,
) -> dict[str, Any]:
    """One line of a chart.

    Args:
        name: in the legend.
        steps: int64 [points], ascending.
        values: float64 [points]; of many points the extremes of each stretch are kept.
        color: number in the palette.
        smooth: whether to draw a running mean over it.
        last: a value to write at the line's end.
        dotted: whether to draw its running mean as dots, so that a line beneath it is seen too.
    """
    steps, values = steps.double(), values.double()
    bad = steps[~values.isfinite()]
    drawn: dict[str, Any] = {"name": name, "color": color}
    if dotted:
        drawn["dotted"] = True
    if last is not None:
        drawn["last"] = float(f"{last:.4g}")
    stretch = math.ceil(len(steps) / _POINTS)
    if stretch > 1:
        padded = -len(steps) % stretch
        parts = torch.cat([values, values.new_full((padded,), torch.nan)]).view(-1, stretch)
        steps = torch.cat([steps, steps[-1:].expand(padded)]).view(-1, stretch)[:, stretch // 2]
        known = parts.isfinite()
        drawn["low"] = plain(torch.where(known, parts, torch.inf).amin(1))
        drawn["high"] = plain(torch.where(known, parts, -torch.inf).amax(1))
        values = torch.where(known, parts, torch.nan).nanmean(1)
    if smooth:
        drawn["smooth"] = plain(_running_mean(values, max(5, len(values) // 40)))
    return {
        **drawn,
        "steps": [int(step) for step in steps.tolist()],
        "values": plain(values),
        "bad": thinned([int(step) for step in bad.tolist()], 200),
    }


def points(
    name: str, steps: Sequence[float], values: Sequence[float | None], color: int = 0
) -> dict[str, Any]:
    """A line through few points, each of which is drawn."""
    known = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)
    line = curve(name, torch.tensor(steps), known, color=color)
    return {**line, "points": len(line["steps"]) <= 200}


def panel(
    title: str,
    series: Sequence[Mapping[str, Any]],
    *,
    unit: str = "",
    log: bool | None = None,
    limit: tuple[float, str] | None = None,
    height: int = 180,
) -> dict[str, Any]:
    """One field with axes.

    Args:
        title: what is on its y axis.
        series: what `curve` returned.
        unit: of the y axis, e.g. "%".
        log: whether its axis is logarithmic; by default where the values ask for it.
        limit: a line to draw across, and what it is called.
        height: in pixels.
    """
    drawn: dict[str, Any] = {
        "title": title,
        "unit": unit,
        "log": _wide(series) if log is None else log,
        "series": list(series),
        "height": height,
    }
    if limit is not None:
        drawn["limit"] = {"value": limit[0], "label": limit[1]}
    return drawn


def panels(
    title: str,
    look: str,
    fields: Sequence[Mapping[str, Any]],
    *,
    last: int,
    lanes: Sequence[Mapping[str, Any]] = (),
    undone: Sequence[Sequence[int]] = (),
    first: int = 0,
) -> Chart:
    """A chart: fields one below the other over the same steps, and lanes of events.

    Args:
        title: above it.
        look: what to see in it.
        fields: what `panel` returned.
        last: the last step.
        lanes: of events, beneath.
        undone: stretches of steps to hatch.
        first: the first step.
    """
    return {
        "type": "panels",
        "title": title,
        "look": look,
        "first": first,
        "last": max(last, first + 1),
        "panels": list(fields),
        "lanes": list(lanes),
        "undone": [list(stretch) for stretch in undone],
    }


def plain(values: Tensor) -> list[float | None]:
    """To five digits, None for what is not finite."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]


def thinned(values: list[int], most: int) -> list[int]:
    """At most so many, evenly chosen."""
    every = math.ceil(len(values) / most)
    return values[:: max(1, every)]


def _running_mean(values: Tensor, window: int) -> Tensor:
    """float64 [points]: centred, over what is finite; NaN where nothing is."""
    known = values.isfinite()
    half = window // 2
    sums = torch.nn.functional.pad(torch.where(known, values, 0.0).cumsum(0), (1, 0))
    counts = torch.nn.functional.pad(known.double().cumsum(0), (1, 0))
    at = torch.arange(len(values))
    low, high = (at - half).clamp(min=0), (at + half + 1).clamp(max=len(values))
    return (sums[high] - sums[low]) / (counts[high] - counts[low])


def _wide(series: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the values are positive and differ by orders of magnitude."""
    ends = [line.get(name, line["values"]) for line in series for name in ("low", "high")]
    known = [value for values in ends for value in values if value is not None]
    return bool(known) and min(known) > 0 and max(known) / min(known) > _WIDE
