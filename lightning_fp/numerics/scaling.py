"""From the largest magnitude (amax) to the scale of a cast."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

AMAX_LOWER_BOUND = 1e-12
"""Smaller amax values are treated as this one. Without a bound the scale of a nearly empty tensor
overflows and the product turns NaN (pytorch/ao#3356); the value is torchao's."""


def tensor_amax(x: Tensor) -> Tensor:
    """Largest magnitude of a whole tensor.

    Args:
        x: any shape, any floating-point dtype.

    Returns:
        float32 scalar; 0 for an empty tensor, NaN if `x` has a NaN, else inf if it has an inf.
    """
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    if torch.compiler.is_compiling():
        return x.detach().abs().amax().float()
    # One pass instead of two; aminmax propagates NaN.
    low, high = torch.aminmax(x if is_legacy_batchedtensor(x) else x.detach())
    return torch.maximum(high, -low).float()


def row_amax(x: Tensor) -> Tensor:
    """Largest magnitude along the last dimension.

    Args:
        x: [..., K].

    Returns:
        float32 [..., 1]; NaN and inf appear only in the rows that hold them.
    """
    if x.numel() == 0:
        return torch.zeros((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    return x.detach().abs().amax(dim=-1, keepdim=True).float()


def amax_to_scale(amax: Tensor, limit: float, *, power_of_two: bool = False) -> Tensor:
    """The factor that brings values of magnitude `amax` to `limit`.

    Args:
        amax: float32, non-negative, any shape.
        limit: largest finite value of the target format.
        power_of_two: round the scale down to a power of two, so that scaling is exact.

    Returns:
        float32, same shape as `amax`. An amax of 0 gives the scale 1 (nothing to scale); amax is
        at least `AMAX_LOWER_BOUND` otherwise; inf and NaN give NaN, so that a cast with this
        scale cannot hide them.
    """
    # `limit / amax` would multiply by the reciprocal: two roundings, up to 3 ulp off and above
    # the next power of two; a tensor divided by a tensor rounds once.
    # And AMAX_LOWER_BOUND is written out: under `dynamic=True` dynamo takes a module's float for an
    # input of the graph, and loses it where a second autograd function asks for it.
    scale = amax.new_full((), limit) / amax.clamp(min=1e-12)
    if power_of_two:
        # The exponent alone. Scales of finite amaxes are normal, and MPS has no frexp.
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(torch.isfinite(amax), scale, torch.nan)


def nonfinite_count(x: Tensor) -> Tensor:
    """How many values are inf or NaN; nothing is read from the device to know it.

    Args:
        x: any shape.

    Returns:
        float32 scalar.
    """
    x = x.detach()
    if not torch.compiler.is_compiling():
        return torch.count_nonzero(x - x).float()  # NaN, where it is not 0
    # A float sum of one comparison: compilers vectorise it into the pass that finds the amax.
    finite = x.abs() <= torch.finfo(x.dtype).max
    return torch.where(finite, 0.0, 1.0).sum()
