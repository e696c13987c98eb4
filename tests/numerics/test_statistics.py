"""Every statistic equals what Python floats say, element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_fp.numerics import (
    COLUMN,
    MAXIMA,
    STATISTICS,
    FloatFormat,
    casts_of,
    combine,
    float_format,
    operand_statistics,
    output_statistics,
    sampled_rows,
    shares,
)
from lightning_fp.numerics.combining import wide_dtype
from lightning_fp.numerics.statistics import _at_once, _squares

E4M3, E5M2 = float_format("e4m3"), float_format("e5m2")
NUMPY = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}

# Around every limit of both formats, at scale 1.
SPECIAL = torch.tensor(
    [
        *(0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-45, 3e38, -3e38),
        *(2.0**-10, -(2.0**-10), 2.0**-9, 1.001 * 2.0**-10, 2.0**-17, 2.0**-16),
        *(448.0, 463.9, 464.0, -464.0, 464.1, 57344.0, 61439.0, 61440.0, -61440.0, 1e6),
    ]
).tolist()  # as float32
values = st.one_of(
    st.sampled_from(SPECIAL),
    st.floats(-600, 600, width=32, allow_subnormal=True),
    st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)
scales = st.one_of(st.sampled_from([1.0, 2.0**-6, 2.0**10]), st.floats(2.0**-7, 2.0**7, width=32))


def brute_force(
    rows: Sequence[Sequence[float]], scale: Sequence[float], format: FloatFormat
) -> dict[str, float]:
    """The columns by their definitions; the product with the scale is float32, as in the cast."""
    row = dict.fromkeys(COLUMN, 0.0)
    ulp = 2.0 ** (format.max_exponent - format.mantissa_bits)
    for values, factor in zip(rows, scale, strict=True):
        for value in map(float, values):
            row["numel"] += 1
            if not math.isfinite(value):
                row["nonfinite"] += 1
                continue
            row["amax"] = max(row["amax"], abs(value))
            with np.errstate(over="ignore"):
                scaled = float(np.float32(value) * np.float32(factor))
            scaled = max(min(scaled, 1e16), -1e16)
            inside = max(min(scaled, format.max), -format.max)
            cast = float(np.array(inside, np.float32).astype(NUMPY[format.name]))
            # Without the limit, rounding to nearest even would go beyond it.
            clamped = abs(scaled) > format.max and round(abs(scaled) / ulp) * ulp > format.max
            row["nonzero"] += scaled != 0
            row["clamped"] += clamped
            row["excess"] += (abs(scaled) - format.max) if clamped else 0.0
            row["magnitude"] += abs(scaled)
            row["underflow"] += scaled != 0 and cast == 0
            row["signal"] += (scaled / factor) ** 2
            row["noise"] += ((cast - scaled) / factor) ** 2
            row["clamp_noise"] += ((inside - scaled) / factor) ** 2
    return row


def columns(row: Tensor) -> dict[str, float]:
    return dict(zip(COLUMN, row.tolist(), strict=True))


def assert_same(row: Tensor, expected: dict[str, float], factor: float = 1.0) -> None:
    found = columns(row)
    for statistic in STATISTICS:
        name = statistic.name
        if name in ("signal", "noise", "clamp_noise"):
            # Squares are float32: those of scaled values below 1e-19 are lost.
            tolerance = 1e-36 / factor**2 + 1e-5 * expected[name]
            if name == "noise":  # a difference of float32 numbers
                tolerance += 1e-12 * expected["signal"]
        elif statistic.name in ("excess", "magnitude", "amax"):
            tolerance = 3e-6 * abs(expected[name])
        elif statistic.name in ("log_scale", "log_scale_squared"):
            tolerance = 1e-12 * max(1.0, abs(expected[name]))
        else:
            tolerance = 0
        assert found[name] == pytest.approx(expected[name], rel=0, abs=tolerance), name


@settings(max_examples=150, deadline=None)
@given(st.lists(values, max_size=24), scales, st.sampled_from([E4M3, E5M2]))
@example(SPECIAL, 1.0, E4M3)
@example(SPECIAL, 1.0, E5M2)
@example([], 1.0, E4M3)
@example([500.0] * 4, 1.0, E4M3)
@example([0.0, -0.0], 1.0, E4M3)
@example([math.nan, math.inf], 1.0, E5M2)
@example([*[0.01] * 20, 3000.0], 1.0, E4M3)
def test_one_scale(x: list[float], scale: float, format: FloatFormat) -> None:
    operand, factor = torch.tensor(x).view(1, -1), torch.tensor(scale)
    row = operand_statistics(operand, factor, format)
    assert_same(row, brute_force([x], [scale], format), scale)
    if x:  # what compilers and devices get is the same
        torch.testing.assert_close(_at_once(operand, factor, format), row[:8])
        squares = _squares(casts_of(operand, factor, format), format, None)
        torch.testing.assert_close(squares, row[8:11])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(values, values, values), min_size=1, max_size=6).flatmap(
        lambda rows: st.tuples(
            st.just(rows), st.lists(scales, min_size=len(rows), max_size=len(rows))
        )
    )
)
def test_one_scale_per_row(case: tuple[list[tuple[float, ...]], list[float]]) -> None:
    rows, scale = case
    operand, factor = torch.tensor(rows), torch.tensor(scale).view(-1, 1)
    row = operand_statistics(operand, factor, E4M3)
    torch.testing.assert_close(_at_once(operand, factor, E4M3), row[:8])
    logs = [math.log2(factor) for factor in scale]
    spread = {"scales": len(scale), "log_scale": sum(logs)}
    spread["log_scale_squared"] = sum(log * log for log in logs)
    assert_same(row, {**brute_force(rows, scale, E4M3), **spread}, min(scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype(dtype: torch.dtype) -> None:
    x = (torch.randn(8, 16) * 100).to(dtype)
    row = operand_statistics(x, torch.tensor(3.0), E4M3)
    assert_same(row, brute_force(x.float().tolist(), [3.0] * 8, E4M3), 3.0)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_sums_do_not_depend_on_the_default_dtype(default: torch.dtype) -> None:
    """Forwards under `bf16-true` and `16-true` have another."""
    x, scale = torch.randn(8, 16), torch.tensor(3.0)
    expected = operand_statistics(x, scale, E4M3)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(operand_statistics(x, scale, E4M3), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_sampled_rows_are_the_only_ones_in_the_squares() -> None:
    x = torch.randn(8, 16) * 300
    index, scale = torch.tensor([1, 5]), torch.tensor(1.0)
    row = columns(operand_statistics(x, scale, E4M3, casts_of(x, scale, E4M3, index)))
    whole = brute_force(x.tolist(), [1.0] * 8, E4M3)
    sampled = brute_force(x[index].tolist(), [1.0] * 2, E4M3)
    assert row["clamped"] == whole["clamped"] > sampled["clamped"]
    for name in ("signal", "noise", "clamp_noise"):
        assert row[name] == pytest.approx(sampled[name], rel=1e-5)


def test_a_scale_that_is_not_finite_counts_as_one() -> None:
    x = torch.tensor([[1.0, math.inf]])
    row = columns(operand_statistics(x, torch.tensor(math.nan), E4M3))
    assert (row["nonfinite"], row["numel"], row["magnitude"], row["amax"]) == (1, 2, 1, 1)


def test_tiny_tensors_have_an_sqnr() -> None:
    """Squares of gradients of 1e-25 would be zero in float32."""
    x = torch.randn(4, 64) * 1e-25
    scale = 448 / x.abs().amax()
    assert 25 < shares(operand_statistics(x, scale, E4M3))["sqnr_db"].item() < 40


@pytest.mark.parametrize("at_once", [False, True])
def test_a_scale_per_value_is_that_of_its_block(at_once: bool) -> None:
    """Blocks of 32 as rows of their own: the same sums, also where squares would vanish."""
    x = torch.randn(6, 96) * torch.logspace(-25, 3, 6).unsqueeze(1)
    x[2, 40] = math.nan
    blocks = x.view(18, 32)
    scale = 448 / blocks.nan_to_num().abs().amax(dim=-1, keepdim=True)
    spread = scale.repeat_interleave(32, dim=1).view(6, 96)
    found = columns(operand_statistics(x, spread, E4M3))
    if at_once:  # as a compiler gets it
        row = torch.cat(
            [_at_once(x, spread, E4M3), _squares(casts_of(x, spread, E4M3), E4M3, None)]
        )
        found.update(zip(COLUMN, row.tolist(), strict=False))
    for name, value in columns(operand_statistics(blocks, scale, E4M3)).items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert found["scales"] == 18
    deviation = scale.double().log2().std(correction=0).item()
    assert shares(operand_statistics(x, spread, E4M3))["scale_spread_bits"] == pytest.approx(
        deviation
    )


@pytest.mark.parametrize("shape", ["scalar", "rows", "values"])
@pytest.mark.parametrize("shift", [1.0, 0.99, 8.0], ids=["to the limit", "within", "clamped"])
def test_pieces_of_a_large_operand_add_up(shape: str, shift: float) -> None:
    """Three whole pieces and a rest; what is largest, and not finite, in the last of them."""
    torch.manual_seed(0)
    x = torch.randn(200, 1000) * torch.logspace(-6, 0, 200).unsqueeze(1)
    x[:, ::7] = 0
    x[-1, -1] = 10.0
    full = torch.tensor(448 / 10.0 * shift)
    scale = {
        "scalar": full,
        "rows": full.expand(200, 1).clone(),
        "values": full * torch.logspace(-3, 0, 200).unsqueeze(1).expand(200, 1000),
    }[shape]
    for broken in (False, True):
        if broken:
            x[-1, -2] = math.nan
        row = operand_statistics(x, scale, E4M3)[:8]
        torch.testing.assert_close(row, _at_once(x, scale, E4M3), rtol=1e-6, atol=0)
        assert row[1] == broken
        torch.testing.assert_close(operand_statistics(x.bfloat16(), scale, E4M3)[1], row[1])


@pytest.mark.parametrize("split", [1, 3, 7])
def test_rows_add_up(split: int) -> None:
    x = torch.randn(8, 16) * 300
    scale = torch.tensor(2.0)
    whole = operand_statistics(x, scale, E4M3)
    parts = [operand_statistics(part, scale, E4M3) for part in (x[:split], x[split:])]
    for statistic, one, *others in zip(STATISTICS, whole, *parts, strict=True):
        combined = max(others) if statistic.combine == "max" else sum(others)
        assert combined.item() == pytest.approx(one.item()), statistic.name


def test_output_error_is_split() -> None:
    exact = torch.tensor([[3.0, 4.0], [math.inf, 0.0]])
    row = columns(output_statistics(exact, exact - 0.5, exact - 1.0))
    assert (row["amax"], row["nonfinite"], row["numel"]) == (4, 1, 4)
    assert (row["signal"], row["noise"], row["clamp_noise"]) == (25, 3, 0.75)


class TestSampledRows:
    @given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 100))
    def test_every_stride_th(self, count: int, stride: int, offset: int) -> None:
        rows = sampled_rows(count, stride, torch.tensor(offset)).tolist()
        assert len(rows) == len(set(rows)) == math.ceil(count / stride)
        assert all(0 <= row < count for row in rows)

    def test_all_rows_have_their_turn(self) -> None:
        seen = {
            row for offset in range(8) for row in sampled_rows(32, 8, torch.tensor(offset)).tolist()
        }
        assert seen == set(range(32))

    def test_no_rows(self) -> None:
        assert sampled_rows(0, 8, torch.tensor(3)).numel() == 0


class TestShares:
    def of(self, **sums: float) -> dict[str, float]:
        row = torch.zeros(len(STATISTICS), dtype=torch.float64)
        for name, value in sums.items():
            row[COLUMN[name]] = value
        return {name: value.item() for name, value in shares(row).items()}

    def test_denominators(self) -> None:
        row = self.of(
            numel=10, clamped=1, excess=2, magnitude=8, underflow=1, nonzero=4, signal=100, noise=1
        )
        assert row["clamped_fraction"] == 0.1
        assert row["clamped_mass"] == 0.25
        assert row["underflow_fraction"] == 0.25
        assert row["sqnr_db"] == 20
        assert row["clamp_sqnr_db"] == math.inf

    def test_nothing_seen(self) -> None:
        row = self.of()
        assert row["clamped_fraction"] == row["clamped_mass"] == row["underflow_fraction"] == 0
        assert math.isnan(row["sqnr_db"])
        assert math.isnan(row["clamp_sqnr_db"])

    def test_many_at_once(self) -> None:
        sums = torch.rand(3, 4, len(STATISTICS), dtype=torch.float64)
        found = shares(sums)
        for name, value in found.items():
            assert value.shape == (3, 4)
            torch.testing.assert_close(value[1, 2], shares(sums[1, 2])[name])


def test_rows_combine_as_their_columns_say() -> None:
    one, other = torch.rand(2, 5, len(STATISTICS), dtype=torch.float64)
    both = combine(one, other)
    for column, statistic in enumerate(STATISTICS):
        rule = torch.maximum if statistic.combine == "max" else torch.add
        assert torch.equal(both[:, column], rule(one[:, column], other[:, column]))
    assert torch.equal(combine(one[:, :2], other[:, :2]), both[:, :2])  # what every step records
    rules = [statistic.combine for statistic in STATISTICS]
    assert rules == ["max"] * MAXIMA + ["sum"] * (len(rules) - MAXIMA)


def test_sums_are_kept_in_what_a_device_has() -> None:
    """MPS has no float64."""
    assert wide_dtype(torch.device("mps")) is torch.float32
    assert wide_dtype(torch.device("cpu")) is wide_dtype(torch.device("cuda")) is torch.float64
