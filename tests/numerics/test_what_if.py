"""What other scalings would have done, against Python floats and ml_dtypes, element by element."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_fp.numerics import WHAT_IF, float_format, what_if_statistics
from lightning_fp.numerics.scaling import amax_to_scale

DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
NAMES = [statistic.name for statistic in WHAT_IF]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-10, 448.0, 464.0, -465.0, 61440.0, 1e-6]

values = st.one_of(st.sampled_from(SPECIAL), st.floats(-1e5, 1e5, width=32, allow_subnormal=False))
matrices = st.sampled_from([1, 2, 3, 130]).flatmap(
    lambda width: st.lists(st.lists(values, min_size=width, max_size=width), min_size=1, max_size=4)
)


def flushed(row: list[float], scale: float, name: str) -> int:
    """Elements that are finite, not zero, and zero after the cast."""
    scaled = np.float32(row) * np.float32(scale)
    cast = scaled.astype(DTYPES[name]).astype(np.float32)
    return sum(x != 0 and y == 0 for x, y in zip(row, cast, strict=True))


def scale_for(values: list[float], name: str) -> float:
    amax = max(map(abs, values), default=0.0)
    return float(amax_to_scale(torch.tensor(amax), float_format(name).max))


def brute_force(rows: list[list[float]], name: str, scale: float | None) -> dict[str, float]:
    format, other = float_format(name), {"e4m3": "e5m2", "e5m2": "e4m3"}[name]
    finite = [[x if math.isfinite(x) else 0.0 for x in row] for row in rows]
    every = [x for row in finite for x in row]
    has = scale is not None and scale > 0
    over = [abs(x) for x in every if has and abs(x) * scale > format.clamp_point]
    return {
        "size": math.fsum(map(abs, every)),
        "delayed_numel": len(every) if has else 0,
        "delayed_clamped": len(over),
        "delayed_excess": math.fsum(x - format.max / scale for x in over),
        "sampled_nonzero": sum(x != 0 for x in every),
        "delayed_underflow": flushed(every, scale, name) if has else 0,
        "dynamic_underflow": flushed(every, scale_for(every, name), name),
        "rowwise_underflow": sum(flushed(row, scale_for(row, name), name) for row in finite),
        "block_underflow": sum(
            flushed(part, scale_for(part, name), name)
            for row in finite
            for part in (row[:128], row[128:])
        ),
        "other_underflow": flushed(every, scale_for(every, other), other),
    }


@pytest.mark.parametrize("name", DTYPES)
@given(
    rows=matrices,
    # a power of two, so that scaling rounds nothing where a value is right at a limit
    scale=st.one_of(st.none(), st.just(0.0), st.integers(-12, 12).map(lambda k: 2.0**k)),
)
@example(rows=[[math.nan, math.inf]], scale=1.0)
@example(rows=[[464.0, -464.5, 1e-7]], scale=1.0)
def test_every_column_equals_the_brute_force(
    name: str, rows: list[list[float]], scale: float | None
) -> None:
    given_scale = None if scale is None else torch.tensor(scale)
    found = what_if_statistics(torch.tensor(rows), float_format(name), given_scale)
    expected = brute_force(torch.tensor(rows).tolist(), name, scale)
    assert dict(zip(NAMES, found.tolist(), strict=True)) == pytest.approx(expected, rel=1e-6)


def test_underflow_is_counted_on_the_sampled_rows_and_clamping_on_all() -> None:
    x = torch.tensor([[1000.0, 1e-9], [1.0, 1e-9], [1.0, 1.0]])
    found = what_if_statistics(x, float_format("e4m3"), torch.tensor(1.0), torch.tensor([1, 2]))
    columns = dict(zip(NAMES, found.tolist(), strict=True))
    assert columns["delayed_clamped"] == 1
    assert columns["delayed_excess"] == 1000 - 448
    assert columns["sampled_nonzero"] == 4
    assert columns["delayed_underflow"] == 1
