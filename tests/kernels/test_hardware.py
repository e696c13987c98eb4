"""The hardware's rules are refused in our words, before the GEMM says them in its own."""

from __future__ import annotations

import re

import pytest
import torch

from lightning_fp.format_names import base_row
from lightning_fp.kernels.hardware import (
    check_alignment,
    cuda_fp8_refusal,
    cuda_has_fp8,
    cuda_mx_refusal,
    cuda_product_refusal,
)


@pytest.mark.parametrize(
    ("sizes", "dimension", "size"),
    [
        ((7, 32, 32), "tokens (the product of the input's leading dimensions)", 7),
        ((16, 30, 32), "in_features", 30),
        ((16, 32, 50257), "out_features", 50257),
    ],
)
def test_odd_dimensions_are_named(sizes: tuple[int, int, int], dimension: str, size: int) -> None:
    tokens, in_features, out_features = sizes
    message = f"layer 'mlp.up': {dimension} must be a multiple of 16 for the FP8 GEMM, got {size};"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_alignment("mlp.up", tokens=tokens, in_features=in_features, out_features=out_features)
    assert "layers={'mlp.up': 'bf16'}" in str(error.value)


def test_multiples_of_16_pass() -> None:
    check_alignment("layer", tokens=0, in_features=16, out_features=4096)


def test_refusal_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_fp8_refusal() == "no CUDA device"
    assert not cuda_has_fp8()


@pytest.mark.parametrize(
    ("devices", "refusal"),
    [
        ([(8, 9)], None),
        ([(9, 0), (10, 0)], None),
        ([(8, 0)], "FP8 tensor cores need sm89 or later, this device is sm80"),
        ([(9, 0), (7, 5)], "FP8 tensor cores need sm89 or later, this device is sm75"),
    ],
)
def test_the_oldest_device_decides(
    monkeypatch: pytest.MonkeyPatch, devices: list[tuple[int, int]], refusal: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: devices[index])
    monkeypatch.setattr(torch.version, "hip", None)
    assert cuda_fp8_refusal() == refusal


@pytest.mark.parametrize("granularity", ["tensor", "row", "block", "mx"])
def test_blocks_must_be_whole(granularity: str) -> None:
    multiple = {"tensor": 16, "row": 16, "block": 128, "mx": 32}[granularity]
    sizes = {"tokens": 2 * multiple, "in_features": multiple, "out_features": 3 * multiple}
    assert base_row("dynamic", granularity).alignment == multiple  # pyright: ignore
    check_alignment("layer", **sizes, multiple=multiple)
    for name in sizes:
        odd = {**sizes, name: sizes[name] + multiple // 2}
        with pytest.raises(ValueError, match=f"{name}.* must be a multiple of {multiple} .*got"):
            check_alignment("layer", **odd, multiple=multiple)


@pytest.mark.parametrize(
    ("devices", "refusal"),
    [
        ([(10, 0)], None),
        ([(11, 0), (10, 3)], None),
        ([(8, 9)], "MX formats need sm100 (Blackwell), this device is sm89"),
        ([(10, 0), (9, 0)], "MX formats need sm100 (Blackwell), this device is sm90"),
        ([(12, 0)], "MX formats need sm100 (Blackwell), this device is sm120"),
        ([], None),
    ],
)
def test_mx_needs_blackwell(
    monkeypatch: pytest.MonkeyPatch, devices: list[tuple[int, int]], refusal: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: devices[index])
    monkeypatch.setattr(torch.version, "hip", None)
    assert cuda_mx_refusal() == refusal


@pytest.mark.parametrize(
    ("operands", "options", "instead"),
    [
        (("e4m3", "e4m3", "e5m2"), {}, None),
        (("e5m2", "e4m3", "e4m3"), {}, None),
        (("e4m3", "e5m2", "e4m3"), {}, None),
        (("e5m2", "e4m3", "e5m2"), {}, "take grad_output='e4m3' or grad_weight='high'"),
        (("e5m2", "e4m3", "e5m2"), {"high_grad_weight": True}, None),
        (("e4m3", "e5m2", "e5m2"), {"high_grad_weight": True}, "take grad_output='e4m3'"),
        (("e5m2", "e5m2", "e4m3"), {}, "take input='e4m3'"),
        (("e4m3", "e4m3", "e5m2"), {"by_row": True}, None),
        (("e5m2", "e4m3", "e4m3"), {"by_row": True}, "take input='e4m3' or grad_weight='high'"),
        (("e4m3", "e5m2", "e4m3"), {"by_row": True}, "take weight='e4m3'"),
        (("e4m3fnuz", "e4m3", "e5m2"), {}, "take input='e4m3'"),
        (("e4m3", "e4m3", "e5m2fnuz"), {}, "take grad_output='e5m2'"),
    ],
)
def test_products_that_nvidia_has_not(
    operands: tuple[str, str, str], options: dict[str, bool], instead: str | None
) -> None:
    found = cuda_product_refusal(*operands, **{"high_grad_weight": False, **options})
    assert found is None if instead is None else str(found).endswith(instead)
