"""Attention's products in a simulated format, by the format's name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from lightning_fp.kernels import SimulatedAttention, SimulatedKernel
from lightning_fp.layers.backends import kernel_for
from lightning_fp.layers.format import FormatLike, linear_format


def simulated_attention(format: FormatLike) -> AbstractContextManager[object]:
    """Around a forward: `F.scaled_dot_product_attention` multiplies in a simulated format.

    >>> import torch, torch.nn.functional as F
    >>> q = torch.randn(1, 2, 8, 4)
    >>> with simulated_attention("e8m3"):
    ...     F.scaled_dot_product_attention(q, q, q, is_causal=True).shape
    torch.Size([1, 2, 8, 4])

    Args:
        format: of all operands; one in high precision changes nothing.

    Raises:
        ValueError: for a format that is neither.
    """
    return attention_mode(format) or nullcontext()


def attention_mode(format: FormatLike, field: str = "format") -> SimulatedAttention | None:
    """What has attention multiply in a simulated format; None for one in high precision.

    Args:
        format: of all operands.
        field: what an error calls it.

    Raises:
        ValueError: for a format that is neither.
    """
    try:
        read = linear_format(format)
    except ValueError as error:
        raise ValueError(str(error).replace("format", field, 1)) from error
    if read.is_high_precision:
        return None
    kernel = kernel_for(read, "auto", cuda_fp8=False)
    if not isinstance(kernel, SimulatedKernel):
        raise ValueError(
            f"{field} must be a simulated one, such as 'e4m3' or 'e8m3-truncate', got"
            f" {read.name!r}; attention in real FP8 is Transformer Engine's"
        )
    return SimulatedAttention(kernel)
