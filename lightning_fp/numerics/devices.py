"""Which devices hold a format in torch's own dtype; on the others its values are bytes.

MPS has no float8 dtype. On NVIDIA below sm89 compiled code cannot store e4m3 (pytorch#167082), and
Triton has AMD's fnuz formats on no NVIDIA card at all; eager code there does as compiled code must.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from lightning_fp.numerics.formats import FloatFormat

FP8_MIN_CAPABILITY = (8, 9)
"""First NVIDIA architecture with FP8 tensor cores (Ada sm89; Hopper is sm90)."""

CPU_STANDS_IN_FOR: Literal["mps", "sm80"] | None = None
"""What a CPU does without too, for tests: float8 dtypes, and on "mps" float64 as well."""


def has_dtype(format: FloatFormat, device: torch.device) -> bool:
    """Whether an 8-bit format is stored in its dtype on a device, eagerly and compiled.

    Args:
        format: any format with a dtype.
        device: where its values are.
    """
    if device.type == "mps":
        return False
    if device.type == "cuda":
        return _cuda_has_float8(format.name.endswith("fnuz"))
    return not (device.type == "cpu" and CPU_STANDS_IN_FOR)


@torch.compiler.assume_constant_result
def _cuda_has_float8(fnuz: bool) -> bool:
    return cuda_has_float8(fnuz)


@cache
def cuda_has_float8(fnuz: bool) -> bool:
    """Whether the CUDA devices here store float8; asked once."""
    if torch.version.hip is not None:
        return True
    return not fnuz and least_capability() >= FP8_MIN_CAPABILITY


def least_capability() -> tuple[int, int]:
    """The oldest architecture among the CUDA devices here; that with FP8 where there are none.

    Initialises CUDA. Without CUDA there are fake tensors only, as of a plan for another machine.
    """
    if not torch.cuda.is_available():
        return FP8_MIN_CAPABILITY
    count = torch.cuda.device_count()
    return min(torch.cuda.get_device_capability(index) for index in range(count))
