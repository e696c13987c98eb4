"""How precise a linear layer's products are in each FP8 format, with and without outliers.

Prints the table of docs/formats.md; one CPU thread, a few seconds:

    python benchmarks/block_accuracy.py
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fp.layers import kernel_for, linear_format

FORMATS = ("fp8-dynamic", "fp8-rowwise", "fp8-block", "mxfp8")
TOKENS, IN, OUT = 512, 512, 256


def operands(outliers: str) -> list[Tensor]:
    """x, weight and the gradient of the output; float32."""
    torch.manual_seed(0)
    x, weight = torch.randn(TOKENS, IN), torch.randn(OUT, IN) * 0.05
    g = torch.randn(TOKENS, OUT) * 1e-4
    for tensor, feature in ((x, 7), (g, 5)):
        if outliers == "one feature":
            tensor[:, feature] *= 1000
        elif outliers == "50 values":
            tensor.view(-1)[torch.randperm(tensor.numel())[:50]] *= 1000
    return [x, weight, g]


def products(tensors: list[Tensor], format: str | None) -> list[Tensor]:
    """Output, gradient of the input, gradient of the weight."""
    x, weight = (tensor.clone().requires_grad_() for tensor in tensors[:2])
    if format is None:
        output = F.linear(x, weight)
    else:
        kernel = kernel_for(linear_format(format), "auto", cuda_fp8=False)
        output = kernel(x, weight, None, "layer")
    output.backward(tensors[2])
    return [output.detach(), *(leaf.grad for leaf in (x, weight) if leaf.grad is not None)]


def sqnr_db(exact: Tensor, found: Tensor) -> float:
    """Signal to quantization noise in decibels."""
    return 20 * math.log10(exact.norm() / (exact - found.double()).norm())


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| | " + " | ".join(f"`{name}`" for name in FORMATS) + " |")
    for outliers in ("none", "one feature", "50 values"):
        tensors = operands(outliers)
        exact = products([tensor.double() for tensor in tensors], None)
        cells = []
        for name in FORMATS:
            pairs = zip(exact, products(tensors, name), strict=True)
            cells.append(", ".join(f"{sqnr_db(*pair):.1f}" for pair in pairs))
        print(f"| {outliers} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
