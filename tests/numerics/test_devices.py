"""Which devices store an 8-bit format in torch's dtype."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_fp.numerics import FORMATS
from lightning_fp.numerics.devices import cuda_has_float8, has_dtype

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    cuda_has_float8.cache_clear()
    yield
    cuda_has_float8.cache_clear()


@pytest.mark.parametrize(
    ("capabilities", "e4m3"),
    [([(7, 5)], False), ([(8, 6)], False), ([(8, 9)], True), ([(9, 0), (8, 0)], False)],
)
def test_below_sm89_values_are_bytes(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], e4m3: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    assert has_dtype(FORMATS["e4m3"], CUDA) is e4m3
    assert has_dtype(FORMATS["e5m2"], CUDA) is e4m3
    assert not has_dtype(FORMATS["e4m3fnuz"], CUDA)
    assert has_dtype(FORMATS["e4m3fnuz"], CPU)


def test_on_amds_cards_fnuz_is_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert has_dtype(FORMATS["e4m3fnuz"], CUDA)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz"])
def test_mps_has_none(name: str) -> None:
    assert not has_dtype(FORMATS[name], MPS)
    assert has_dtype(FORMATS[name], CPU)
