"""What this machine multiplies in hardware, and what its FP8 GEMM asks of shapes."""

from __future__ import annotations

import re

import torch

from lightning_fp.format_names import ALIGNMENT
from lightning_fp.numerics.devices import FP8_MIN_CAPABILITY, least_capability

MX_CAPABILITIES = (10, 0), (12, 0)
"""NVIDIA architectures from the first to before the second multiply MX formats (sm100 to sm119)."""

BLOCK_CAPABILITIES = (9, 0), (10, 0)
"""Likewise those whose tensor cores undo one float32 scale per 128 values: Hopper alone (ATen's
ScaledBlas.cpp; cuBLASLt of CUDA 12.9 and later)."""

_BLOCK_CUDA, _BLOCK_TORCH = (12, 9), (2, 13)
"""The first CUDA with these products; the first torch known to lay their scales out as we do."""

CPU_HAS_BF16 = bool(
    torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
    or torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
)
"""Whether the CPU multiplies bf16 in hardware. Without it a bf16 GEMM is several times slower
than a float32 one (measured: 4.7x on a Cascade Lake Xeon)."""


def cuda_fp8_refusal() -> str | None:
    """Why CUDA tensors cannot be multiplied in FP8 here; None if they can.

    Initialises CUDA, so call it at conversion, not at import.
    """
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip is not None:
        return "ROCm: FP8 is emulated in bf16"
    capability = least_capability()
    if capability < FP8_MIN_CAPABILITY:
        major, minor = capability
        return f"FP8 tensor cores need sm89 or later, this device is sm{major}{minor}"
    return None


def cuda_has_fp8() -> bool:
    """Whether CUDA tensors are multiplied by FP8 tensor cores on this machine."""
    return cuda_fp8_refusal() is None


def cuda_mx_refusal() -> str | None:
    """Why the CUDA devices here cannot multiply MX formats.

    Initialises CUDA, so call it at conversion, not at import.

    Returns:
        The reason; None if they can, or if there is no CUDA device, as in a plan for another
        machine.
    """
    return _architecture_refusal("MX formats", "Blackwell", MX_CAPABILITIES)


def cuda_block_refusal() -> str | None:
    """Why the CUDA devices here cannot multiply blocks of 128 without Transformer Engine.

    Initialises CUDA, so call it at conversion, not at import.

    Returns:
        The reason; None if they can, or if there is no CUDA device, as in a plan for another
        machine.
    """
    what = "products of blocks of 128"
    why = _architecture_refusal(what, "Hopper", BLOCK_CAPABILITIES)
    if why is not None or not torch.cuda.is_available():
        return why
    cuda = torch.version.cuda or "0"
    if _version(cuda) < _BLOCK_CUDA or _version(torch.__version__) < _BLOCK_TORCH:
        return (
            f"{what} need torch 2.13 built for CUDA 12.9 or later, this is torch"
            f" {torch.__version__} for CUDA {cuda}"
        )
    return None


def _architecture_refusal(
    what: str, name: str, capabilities: tuple[tuple[int, int], tuple[int, int]]
) -> str | None:
    """Why some CUDA device here is not of the architectures from the first to before the second."""
    if not torch.cuda.is_available():
        return None
    first, beyond = capabilities
    needed = f"{what} need sm{first[0]}{first[1]}"
    if torch.version.hip is not None:
        return f"{needed}, this is ROCm"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not first <= capability < beyond:
            major, minor = capability
            return f"{needed} ({name}), this device is sm{major}{minor}"
    return None


def _version(text: str) -> tuple[int, int]:
    """Major and minor."""
    major, minor = re.findall(r"\d+", text + ".0")[:2]
    return int(major), int(minor)


def cuda_product_refusal(
    input: str, weight: str, grad_output: str, *, high_grad_weight: bool, by_row: bool = False
) -> str | None:
    """Why NVIDIA's FP8 tensor cores cannot multiply a layer's operands in these number formats.

    cuBLASLt has no product of two e5m2 matrices, and torch's products with a scale per row take
    e5m2 as their first operand only (ATen's RowwiseScaledMM.cuh). The fnuz formats are AMD's.

    Args:
        input: number format, see `lightning_fp.numerics.float_format`.
        weight: likewise.
        grad_output: likewise.
        high_grad_weight: whether the weight's gradient is multiplied in high precision.
        by_row: whether each row has a scale.

    Returns:
        The reason, with what to take instead; None if they can.
    """
    operands = {"input": input, "weight": weight, "grad_output": grad_output}
    for operand, number in operands.items():
        if number.endswith("fnuz"):
            other = number.removesuffix("fnuz")
            return f"{operand} {number} is a format of AMD's; take {operand}={other!r}"
    products = {
        "output": ("input", "weight"),
        "grad_input": ("grad_output", "weight"),
        "grad_weight": ("grad_output", "input"),
    }
    if high_grad_weight:
        del products["grad_weight"]
    for product, (first, second) in products.items():
        if operands[second] != "e5m2":
            continue
        high = " or grad_weight='high'" if product == "grad_weight" else ""
        if operands[first] == "e5m2":
            return (
                f"{product} would be {first} in e5m2 by {second} in e5m2, a product that NVIDIA's"
                f" tensor cores do not have; take {first}='e4m3'{high}"
            )
        if by_row:
            return (
                f"{product} would have {second} in e5m2 with a scale per row, which torch takes for"
                f" its first operand only; take {second}='e4m3'{high}"
            )
    return None


def check_alignment(
    layer: str, *, in_features: int, out_features: int, tokens: int = 0, multiple: int = ALIGNMENT
) -> None:
    """Refuse shapes that the FP8 GEMM cannot multiply, before it does with a message of its own.

    Args:
        layer: the layer's name.
        in_features: columns of the weight.
        out_features: rows of the weight.
        tokens: product of the input's leading dimensions, for who pads nothing.
        multiple: what the sizes must be multiples of, see `lightning_fp.format_names`.

    Raises:
        ValueError: naming the layer and the dimension.
    """
    for dimension, size in (
        ("tokens (the product of the input's leading dimensions)", tokens),
        ("in_features", in_features),
        ("out_features", out_features),
    ):
        if size % multiple:
            raise ValueError(
                f"layer {layer!r}: {dimension} must be a multiple of {multiple} for the FP8 GEMM,"
                f" got {size}; pad it (drop_last or padding for tokens), or leave the layer in"
                f" high precision with layers={{{layer!r}: 'bf16'}}"
            )
