"""MXFP8 as torchao trains in it: its op on Blackwell, its emulation elsewhere.

torchao's op takes contiguous bf16 (emulated: or float32) and whole blocks only, and its conversion
drops the bias (pytorch/ao#4846). So the bias is added here, dtypes are made what it takes, and
where it is emulated zeros fill the last blocks, which changes no scale and adds nothing to a sum.
It keeps input and weight for backward, in the dtype it was given: under mixed precision that is a
bf16 copy of the weight. The emulation of `BlockKernel` keeps neither, and gives the same bits: it
takes the place of torchao's in compiled code, where torch has no float8 dtype, and where FSDP2 has
gathered the weight, each of whose casts is then made once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fp.kernels.base import Kernel, compute_dtype, without_autocast
from lightning_fp.kernels.block import MX_BLOCK, BlockKernel
from lightning_fp.kernels.derivatives import first_derivatives_only
from lightning_fp.kernels.gathered_casts import KeptCasts
from lightning_fp.kernels.grouped.groups import Groups
from lightning_fp.kernels.grouped.torchao import torchao_groups
from lightning_fp.kernels.hardware import check_alignment
from lightning_fp.kernels.padding import whole, zeros_to
from lightning_fp.kernels.quiet import import_quietly
from lightning_fp.numerics import FloatFormat
from lightning_fp.numerics.devices import has_dtype


@dataclass(frozen=True, kw_only=True)
class TorchaoMXKernel(Kernel):
    """e4m3 for all operands, blocks of 32, E8M0 scales rounded up."""

    high_grad_weight: bool = False
    """Whether the weight's gradient is computed in high precision."""

    cuda_mx: bool = False
    """Whether CUDA tensors go to tensor cores that multiply MX formats."""

    _op: Any = field(init=False, repr=False, compare=False)
    _options: dict[bool, dict[str, Any]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Looked up here and not in the call, which torch.compile traces.
        torchao = _import_mxfp8()
        object.__setattr__(self, "_op", torchao.op)
        options = {
            emulate: {
                "kernel_preference": torchao.emulated if emulate else torchao.automatic,
                "scale_calculation_mode": torchao.round_up,
                "wgrad_with_hp": self.high_grad_weight,
            }
            for emulate in (False, True)
        }
        object.__setattr__(self, "_options", options)

    @property
    def name(self) -> str:
        """See `Kernel.name`."""
        return "torchao" if self.cuda_mx else "torchao (emulated)"

    @property
    def name_for_groups(self) -> str:
        """See `Kernel.name_for_groups`."""
        return "torchao (grouped)" if self.cuda_mx else super().name_for_groups

    @property
    def runs_on_fp8_hardware(self) -> bool:
        """See `Kernel.runs_on_fp8_hardware`."""
        return self.cuda_mx

    def emulates(self, input: Tensor) -> bool:
        """Whether the products with this input are emulated."""
        return not (self.cuda_mx and input.is_cuda)

    def multiply(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: str,
        memory: Any = None,
        *,
        gathered: KeptCasts | None = None,
        **ignored: Any,
    ) -> Tensor:
        """See `Kernel.multiply`."""
        if input.numel() == 0 or weight.numel() == 0:
            return F.linear(input, weight, bias)
        dtype = compute_dtype(input)
        emulate = self.emulates(input)
        # Compiled for a CPU, torchao's emulation has what was in memory in some gradients of ragged
        # batches (torch 2.13, torchao 0.18).
        theirs = has_dtype(MX_EMULATION.input, input.device) and not torch.compiler.is_compiling()
        if emulate and (gathered is not None or not theirs):
            own = dataclasses.replace(MX_EMULATION, high_grad_weight=self.high_grad_weight)
            return own.multiply(input, weight, bias, layer, gathered=gathered)
        rows = input.reshape(-1, input.shape[-1])
        if not emulate:
            out_features, in_features = weight.shape
            check_alignment(
                layer, in_features=in_features, out_features=out_features, multiple=MX_BLOCK
            )
        taken = torch.float32 if emulate and dtype is not torch.bfloat16 else torch.bfloat16
        with without_autocast(input.device.type):
            output: Tensor = self._op(
                _whole_blocks(rows.to(dtype).to(taken)),
                _whole_blocks(weight.to(taken)),
                **self._options[emulate],
            )
            output = first_derivatives_only(output, layer)
            output = output[: rows.shape[0], : weight.shape[0]].to(dtype)
            output = output.reshape(*input.shape[:-1], weight.shape[0])
            return output if bias is None else output + bias.to(dtype)

    def multiply_groups(
        self,
        input: Tensor,
        weight: Tensor,
        groups: Groups,
        layer: str,
        gathered: KeptCasts | None = None,
    ) -> Tensor:
        """See `Kernel.multiply_groups`."""
        if self.emulates(input):
            return super().multiply_groups(input, weight, groups, layer, gathered)
        high = self.high_grad_weight
        input = input.to(compute_dtype(input))
        return torchao_groups(input, weight, groups, layer, "mx", wgrad_with_hp=high)

    def padding(self, tokens: int, in_features: int, out_features: int) -> int:
        """See `Kernel.padding`; whole blocks of tokens stand in all three products."""
        if not self.cuda_mx:
            return 0
        return 3 * 2 * zeros_to(MX_BLOCK, tokens) * in_features * out_features

    def cast_of(self, operand: int, x: Tensor, scales: Tensor | None) -> tuple[Tensor, FloatFormat]:
        """See `Kernel.cast_of`."""
        return MX_EMULATION.cast_of(operand, x, scales)


MX_EMULATION = BlockKernel(length=MX_BLOCK, square_weight=False, scales="e8m0")
"""The same arithmetic without torchao."""


def _whole_blocks(x: Tensor) -> Tensor:
    """[rows, columns], contiguous, zeros added up to the next multiple of a block."""
    return whole(x, rows=MX_BLOCK, columns=MX_BLOCK)


@dataclass(frozen=True)
class _TorchaoMXFP8:
    op: Any
    emulated: Any
    automatic: Any
    round_up: Any


@cache
def _import_mxfp8() -> _TorchaoMXFP8:
    """torchao's op and the values of its options.

    Raises:
        ValueError: if this torchao has no such op; it is a prototype there and may move.
    """
    try:
        linear = import_quietly("torchao.prototype.moe_training.mxfp8_linear")
        return _TorchaoMXFP8(
            linear._to_mxfp8_then_scaled_mm,
            linear.KernelPreference.EMULATED,
            linear.KernelPreference.AUTO,
            linear.ScaleCalculationMode.RCEIL,
        )
    except (ImportError, AttributeError) as error:
        version = getattr(import_quietly("torchao"), "__version__", "unknown")
        raise ValueError(
            f"format 'mxfp8' needs the MXFP8 training op of torchao 0.18, this is {version}"
            f" ({error}); install torchao==0.18.*, or emulate it with backend='native'"
        ) from error
