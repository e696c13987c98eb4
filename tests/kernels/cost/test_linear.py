"""The cost model: what it stands on, what it must never say, and public figures that it meets."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest

from lightning_fp.cli import signatures
from lightning_fp.kernels.cost import (
    DATA_SHEETS,
    PASSES,
    Casting,
    Hardware,
    gains,
    linear_cost,
    predicted_speedup,
    product_seconds,
    smallest_that_gains,
)
from lightning_fp.kernels.cost.passes import EMULATED

H100 = DATA_SHEETS["h100"]
SIZES = (16, 256, 512, 1024, 2048, 4096, 8192, 28672)


def test_every_card_and_casting_has_its_figures() -> None:
    assert set(DATA_SHEETS) == set(get_args(Hardware)) == set(get_args(signatures.Hardware))
    assert set(PASSES) == set(EMULATED) == set(get_args(Casting))
    for card in DATA_SHEETS.values():
        assert card.fp8 is None or 1.9 < card.fp8 / card.bf16 < 2.1


@pytest.mark.parametrize(
    ("m", "k", "n", "operands", "tflops"),
    [  # DeepGEMM's first table on H800; NVIDIA/cutlass#1662
        (4096, 7168, 2112, "fp8", 1058),
        (4096, 1536, 24576, "fp8", 990),
        (4096, 512, 32768, "fp8", 590),
        (4096, 16384, 7168, "fp8", 1358),
        (4096, 7168, 4096, "fp8", 1304),
        (4096, 2048, 7168, "fp8", 1025),
        (8192, 8192, 8192, "bf16", 765),
        (8192, 8192, 8192, "fp8", 1297),
    ],
)
def test_products_are_those_of_public_tables(
    m: int, k: int, n: int, operands: str, tflops: float
) -> None:
    seconds = product_seconds(H100, m, k, n, operands)  # pyright: ignore[reportArgumentType]
    assert 2e-12 * m * k * n / seconds == pytest.approx(tflops, rel=0.05)


@pytest.mark.parametrize("casting", get_args(Casting))
@pytest.mark.parametrize("hardware", [name for name, card in DATA_SHEETS.items() if card.fp8])
def test_no_gain_below_the_sizes_of_public_tables(hardware: Hardware, casting: Casting) -> None:
    """With any number of tokens, on any card."""
    card = DATA_SHEETS[hardware]
    for k, n, tokens in product(SIZES, SIZES, (1, 64, 1024, 8192, 131072)):
        if not smallest_that_gains(casting, k, n):
            assert predicted_speedup(card, casting, tokens, k, n) <= 1, (k, n, tokens)


def test_the_bounds_are_torchaos() -> None:
    from torch import nn
    from torchao.float8 import _auto_filter_for_recipe

    for casting, recipe in (("tensor", "tensorwise"), ("row", "rowwise")):
        keeps = _auto_filter_for_recipe(recipe, [])
        for k, n in product(SIZES, SIZES):
            layer = nn.Linear(k, n, device="meta")
            assert smallest_that_gains(casting, k, n) == keeps(layer, "layer"), (casting, k, n)


def test_single_layers_of_public_tables() -> None:
    """pytorch/ao#794: 0.80 for M, K, N = 1024, 2048, 1024, and 1.39 for 4096, 8192, 16384."""
    assert predicted_speedup(H100, "tensor", 1024, 2048, 1024) < 1
    assert predicted_speedup(H100, "tensor", 4096, 8192, 16384) == pytest.approx(1.39, abs=0.05)


def test_gains_grow_with_the_layer_and_end_below_two() -> None:
    for casting in get_args(Casting):
        factors = [predicted_speedup(H100, casting, 16384, k, k) for k in (4096, 8192, 16384)]
        assert 1 < factors[0] < factors[1] < factors[2] < 2
    assert not gains("tensor", 512, 2048)
    assert gains("tensor", 4096, 4096)
    assert not gains("tensor", 4096, 4096, tokens=128)


def test_emulation_never_gains() -> None:
    for casting, k in product(get_args(Casting), (512, 4096, 16384)):
        assert predicted_speedup(DATA_SHEETS["a100"], casting, 8192, k, k) < 1
    with pytest.raises(ValueError, match="operands must be 'bf16' on the A100"):
        product_seconds(DATA_SHEETS["a100"], 1, 1, 1, "fp8")


def test_what_is_cast_already_costs_nothing() -> None:
    whole = linear_cost(H100, "tensor", 8192, 4096, 4096)
    for changes in ({"input_is_cast": True}, {"weight_is_cast": True}):
        assert linear_cost(H100, "tensor", 8192, 4096, 4096, **changes).seconds < whole.seconds
    assert linear_cost(H100, "tensor", 8192, 4096, 4096, weight_bytes=4).bytes > whole.bytes
    assert whole.flops == 6 * 8192 * 4096 * 4096
