"""torch's FP8 product on a CPU, for tests of hardware's branch: oneDNN has none below AVX-512.

There, as under `ONEDNN_MAX_CPU_ISA=AVX2`, a product of the same values in float32 takes its place.
"""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("aten", "IMPL")
"""Its kernels are registered for as long as it is there."""


def _is_there() -> bool:
    if "ONEDNN_MAX_CPU_ISA" in os.environ:  # then it refuses some products, and not always
        return False
    a = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    one = torch.ones(())
    try:
        torch._scaled_mm(a, a.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def _multiplied(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    product = (a.float() @ b.float()) * scale_a * scale_b
    product = product if bias is None else product + bias
    return product.to(a.dtype if out_dtype is None else out_dtype)


def ensure() -> None:
    """Have a product, torch's own or the one that takes its place."""
    if _is_there():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is overridden
        _LIBRARY.impl("_scaled_mm", _multiplied, "CPU")
        _LIBRARY.impl(
            "_scaled_mm.out", lambda *args, out, **kw: out.copy_(_multiplied(*args, **kw)), "CPU"
        )
