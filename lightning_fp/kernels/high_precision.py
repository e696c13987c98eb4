"""High precision: nn.Linear itself, or nn.Linear in another 16- or 32-bit dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fp.kernels.base import Kernel, compute_dtype
from lightning_fp.kernels.plain_linear import linear_without_autocast
from lightning_fp.kernels.stored.linear import dequantised_linear
from lightning_fp.kernels.stored.weight import StoredWeight
from lightning_fp.numerics import FloatFormat, format_of_dtype


@dataclass(frozen=True, kw_only=True)
class HighPrecisionKernel(Kernel):
    """Bit-equal to nn.Linear where it would compute in `dtype` anyway."""

    every_derivative = True

    dtype: torch.dtype | None = None
    """The dtype to compute in; None leaves it to autocast and the operands, as nn.Linear does."""

    @property
    def name(self) -> str:
        """See `Kernel.name`."""
        return "nn.Linear"

    @property
    def name_for_groups(self) -> str:
        """See `Kernel.name_for_groups`; in autocast's dtype, or the operands', as it is written."""
        return "as written"

    @property
    def runs_on_fp8_hardware(self) -> bool:
        """See `Kernel.runs_on_fp8_hardware`."""
        return False

    def takes_stored(self, format: FloatFormat) -> bool:
        """See `Kernel.takes_stored`: its values are not kept for backward."""
        return True

    def multiply(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: str,
        memory: Any = None,
        **ignored: Any,
    ) -> Tensor:
        """See `Kernel.multiply`; a float32 layer under autocast returns float32."""
        device = input.device.type
        # Weights of another dtype: of a lazy layer, whose first batch made them within the step.
        same = weight.dtype is input.dtype or torch.is_autocast_enabled(device)
        if self.dtype is None or (compute_dtype(input) is self.dtype and same):
            if isinstance(weight, StoredWeight):
                return dequantised_linear(input, weight, bias)
            return F.linear(input, weight, bias)
        out_dtype = self.dtype if torch.is_autocast_enabled(device) else input.dtype
        bias = None if bias is None else bias.to(self.dtype)
        if weight.dtype is self.dtype:
            output = linear_without_autocast(input.to(self.dtype), weight, bias)
        else:
            output = linear_without_autocast(input.to(self.dtype), weight, bias, self)
        return output.to(out_dtype)

    def cast_weight(self, weight: Tensor, dtype: torch.dtype, seeds: Tensor | None) -> Tensor:
        """See `CastsWeight`."""
        return weight.to(dtype)

    def weight_gradient_dtype(self, dtype: torch.dtype, weight: torch.dtype) -> torch.dtype:
        """See `CastsWeight`; as nn.Linear of that dtype would."""
        return dtype

    def cast_of(self, operand: int, x: Tensor, scales: Tensor | None) -> tuple[Tensor, FloatFormat]:
        """See `Kernel.cast_of`."""
        return torch.ones((), device=x.device), format_of_dtype(self.dtype or compute_dtype(x))
