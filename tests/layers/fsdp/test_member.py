"""A checksum tells whether a shard was written to, where no version does."""

from __future__ import annotations

import pytest
import torch

from lightning_fp.layers.fsdp.member import LANES, checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 7, LANES - 1, LANES, LANES + 1, 1000, 3841])
def test_another_value_or_order_is_another_checksum(size: int, dtype: torch.dtype) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = checksum(values)
    assert checksum(values.clone()) == before
    assert checksum(values.flip(0)) != before
    for place in {0, size // 2, size - 1}:
        written = values.clone()
        written[place] = torch.nextafter(written[place], torch.tensor(9.0, dtype=dtype))
        assert checksum(written) != before


def test_rows_that_change_places_are_seen() -> None:
    """Also where a row is as long as many lanes, or one of them only is moved."""
    rows = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    for other in (rows.flip(0), rows.roll(1, 0), rows[[1, 0, *range(2, 64)]]):
        assert checksum(other.reshape(-1)) != checksum(rows.view(-1))


def test_what_is_not_finite_has_one_too() -> None:
    values = torch.full((600,), torch.nan)
    assert checksum(values) == checksum(values.clone()) != checksum(torch.full((600,), torch.inf))
