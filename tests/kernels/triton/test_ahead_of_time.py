"""The fused casts compile for every card, on a machine without one, and spill nothing."""

from __future__ import annotations

from itertools import product

import pytest

pytest.importorskip("triton")

from tests.kernels.triton.ahead import CAPABILITIES, VARIANTS, compiled, resources


@pytest.mark.parametrize("variant", ["amax", "dynamic"])
def test_hopper(variant: str) -> None:
    kernel = compiled(90, variant, "bf16", "e4m3")
    used = resources(kernel)
    assert used["spilled"] == 0
    assert 0 < used["registers"] <= 128  # two programs of eight warps on each multiprocessor
    assert "cvt.rn.satfinite" not in kernel.asm["ptx"]  # it rounds by integers of its own


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_card(capability: int) -> None:
    for variant, dtype in product(("amax", *VARIANTS), ("bf16", "fp16", "fp32")):
        for format in ("e4m3", "e5m2"):
            used = resources(compiled(capability, variant, dtype, format))
            assert used["spilled"] == 0, (variant, dtype, format, used)
