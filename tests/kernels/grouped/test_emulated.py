"""The grouped product, emulated: each expert as a layer of its own, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fp.kernels.base import Kernel
from lightning_fp.kernels.grouped.groups import Groups, padded
from lightning_fp.layers.backends import kernel_for
from lightning_fp.layers.format import linear_format

SIZES = [5, 0, 1, 18, 0, 40]
"""Tokens of each expert: none, one, and numbers that are no multiples of anything."""
NOBODY = 3
"""Tokens of no expert, at the end."""
FORMATS = ("fp8-rowwise", "fp8-rowwise-gw-hp", "fp8-dynamic", "fp8-block", "mxfp8", "e8m3", "bf16")


def kernel(format: str) -> Kernel:
    return kernel_for(linear_format(format), "auto", cuda_fp8=False)


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Groups, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = sum(SIZES) + NOBODY
    x, w, g = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, 32), (len(SIZES), 48, 32), (rows, 48))
    )
    groups = Groups.of_counts(torch.tensor(SIZES), rows)
    return x.requires_grad_(), w.requires_grad_(), groups, g


def gradients(product: Any, x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = product(x, w)
    return y, *torch.autograd.grad(y, (x, w), g)


def one_by_one(multiply: Any, x: Tensor, w: Tensor) -> Tensor:
    parts = x[: sum(SIZES)].split(SIZES)
    each = [multiply(part, one) for part, one in zip(parts, w.unbind(0), strict=True)]
    return torch.cat([*each, each[0].new_zeros(NOBODY, w.shape[1])])


def sqnr(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach(), exact.detach()
    noise = (found.double() - exact.double()).square().sum()
    return (
        math.inf if noise == 0 else float(10 * torch.log10(exact.double().square().sum() / noise))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_output_and_gradients_against_float64(format: str, dtype: torch.dtype) -> None:
    x, w, groups, g = operands(dtype)
    found = gradients(lambda x, w: kernel(format).multiply_groups(x, w, groups, "experts"), x, w, g)
    wide = [each.detach().double().requires_grad_() for each in (x, w)]
    exact = gradients(
        lambda x, w: one_by_one(lambda a, b: a @ b.t(), x, w), wide[0], wide[1], g.double()
    )
    least = 50 if format == "bf16" else 23
    for one, other in zip(found, exact, strict=True):
        assert one.dtype is dtype
        assert sqnr(one, other) > least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["fp8-rowwise", "fp8-rowwise-gw-hp"])
def test_per_row_is_each_expert_as_torchao_multiplies_a_linear(
    format: str, dtype: torch.dtype
) -> None:
    x, w, groups, g = operands(dtype)
    own = kernel(format)
    found = gradients(lambda x, w: own.multiply_groups(x, w, groups, "experts"), x, w, g)
    theirs = gradients(lambda x, w: Kernel.multiply_groups(own, x, w, groups, "experts"), x, w, g)
    for one, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_an_outlier_changes_the_scale_of_its_own_expert_alone() -> None:
    x, w, groups, _ = operands(torch.float32)
    own = kernel("fp8-dynamic")
    before = own.multiply_groups(x, w, groups, "experts")
    with torch.no_grad():
        x[sum(SIZES[:3]), 0] = 1e4
    after = own.multiply_groups(x, w, groups, "experts")
    mine = groups.of_row == 3
    assert torch.equal(before[~mine], after[~mine])
    assert not torch.equal(before[mine][1:], after[mine][1:])


@pytest.mark.parametrize("format", ["fp8-rowwise", "fp8-dynamic"])
def test_what_is_not_finite_is_seen(format: str) -> None:
    x, w, groups, g = operands(torch.float32)
    with torch.no_grad():
        x[7, 3] = math.inf  # of expert 3
    own = kernel(format)
    y, _, grad_weight = gradients(
        lambda x, w: own.multiply_groups(x, w, groups, "experts"), x, w, g
    )
    assert not y[7].isfinite().any()
    assert not grad_weight[3, :, 3].isfinite().any()
    assert grad_weight[[0, 1, 2, 4, 5]].isfinite().all()


@pytest.mark.parametrize("format", ["fp8-rowwise", "fp8-dynamic", "fp8-block"])
def test_no_token_at_all(format: str) -> None:
    _, w, _, _ = operands(torch.float32)
    x = torch.zeros(0, 32, requires_grad=True)
    groups = Groups.of_counts(torch.zeros(len(SIZES), dtype=torch.int64), 0)
    y = kernel(format).multiply_groups(x, w, groups, "experts")
    assert y.shape == (0, 48)


def test_groups_of_sorted_rows_are_those_of_counts() -> None:
    ids = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    ids = torch.cat([ids, torch.full((NOBODY,), len(SIZES))])
    found, other = (
        Groups.of_sorted(ids, len(SIZES)),
        Groups.of_counts(torch.tensor(SIZES), sum(SIZES) + NOBODY),
    )
    assert torch.equal(found.ends, other.ends)
    assert torch.equal(found.of_row, other.of_row)
    assert found.sizes() == SIZES


@pytest.mark.parametrize("multiple", [16, 32])
def test_padded_groups_begin_and_end_at_multiples(multiple: int) -> None:
    groups = Groups.of_counts(torch.tensor(SIZES), sum(SIZES) + NOBODY)
    place, ends, rows = padded(groups, multiple)
    assert not (ends % multiple).any()
    assert rows % multiple == 0
    assert place.unique().shape == place.shape
    assert int(place.max()) < rows
    starts = torch.nn.functional.pad(ends, (1, 0))
    for row, (where, expert) in enumerate(zip(place.tolist(), groups.of_row.tolist(), strict=True)):
        if expert == len(SIZES):
            assert where >= int(ends[-1]), row
        else:
            assert int(starts[expert]) <= where < int(ends[expert]), row
    assert torch.equal(ends.diff(prepend=ends.new_zeros(1)) >= torch.tensor(SIZES), ends >= 0)
