"""FP8 with one scale per tensor: our own functional autograd.Function.

Keeps for backward the FP8 input (a quarter or half of what high precision keeps) and the
parameter itself. The weight is cast again in backward: under FSDP a saved cast copy would keep
the unsharded weight alive between forward and backward (pytorch/ao#1629).

Where a step has several micro-batches, delayed scaling can cast the weight once for all of them and
their backwards: the layer's memory keeps the cast until the step ends, a byte per element. That is
for eager mode alone (compiled code may write no attributes inside of activation checkpointing), and
for weights that are whole, for the reason above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from lightning_fp.format_names import ALIGNMENT
from lightning_fp.kernels.base import Kernel, compute_dtype, without_autocast
from lightning_fp.kernels.derivatives import (
    gradients_again,
    in_place_of,
    place_of,
    refuse_transforms,
)
from lightning_fp.kernels.float8_free import Cast, Casts
from lightning_fp.kernels.gathered_casts import KeptCasts, WeightOperand, identity
from lightning_fp.kernels.gemm import (
    backward_products,
    cast_operand,
    forward_products,
    operand_dtype,
    unscale,
    widen,
)
from lightning_fp.kernels.grouped.emulated import emulated_groups
from lightning_fp.kernels.grouped.groups import Groups
from lightning_fp.kernels.hardware import check_alignment, cuda_product_refusal
from lightning_fp.kernels.memory import (
    GRAD_OUTPUT,
    INPUT,
    WEIGHT,
    OperandMemory,
    for_leaf,
)
from lightning_fp.kernels.operand import Operand, fused_operand, torch_operand
from lightning_fp.kernels.padding import zeros_to
from lightning_fp.kernels.plain_linear import differentiated_again
from lightning_fp.kernels.stored.linear import StoredLinear
from lightning_fp.kernels.stored.weight import StoredWeight
from lightning_fp.kernels.triton.trial import fuses_on
from lightning_fp.numerics import (
    FORMATS,
    FloatFormat,
    amax_to_scale,
    tensor_amax,
    through_bf16,
)


@dataclass(frozen=True, kw_only=True)
class NativeKernel(Kernel):
    """Per-tensor scaling, by the tensor's own amax (dynamic) or by earlier ones (delayed)."""

    records = True

    input: FloatFormat = FORMATS["e4m3"]
    """8-bit format of the input."""

    weight: FloatFormat = FORMATS["e4m3"]
    """8-bit format of the weight."""

    grad_output: FloatFormat = FORMATS["e5m2"]
    """8-bit format of the gradient of the output."""

    high_grad_weight: bool = False
    """Whether the weight's gradient is computed in high precision (and the input kept in it)."""

    delayed: bool = False
    """Whether scales come from the layer's memory; without one they are dynamic all the same."""

    cold: bool = False
    """Whether the memory may still lack scales: those are then taken from the tensor itself."""

    cuda_fp8: bool = False
    """Whether CUDA tensors go to FP8 tensor cores; everything else is emulated."""

    through_bf16: bool = False
    """Whether weights are rounded to bf16 before they are cast, as an engine receives them."""

    def __post_init__(self) -> None:
        names = self.input.name, self.weight.name, self.grad_output.name
        why = cuda_product_refusal(*names, high_grad_weight=self.high_grad_weight)
        if self.cuda_fp8 and why is not None:
            raise ValueError(f"cuda_fp8 must be False for these formats, got True: {why}")

    @property
    def name(self) -> str:
        """See `Kernel.name`."""
        return "native" if self.cuda_fp8 else "native (emulated)"

    @property
    def name_for_groups(self) -> str:
        """See `Kernel.name_for_groups`."""
        return super().name_for_groups if self.cuda_fp8 else self.name

    @property
    def runs_on_fp8_hardware(self) -> bool:
        """See `Kernel.runs_on_fp8_hardware`."""
        return self.cuda_fp8

    def emulates(self, input: Tensor) -> bool:
        """Whether the products with this input are emulated."""
        return not (self.cuda_fp8 and input.is_cuda)

    def fuses(self, input: Tensor, weight: Tensor, scales: Tensor | None) -> bool:
        """Whether operands are cast by kernels of our own: eagerly, on tensor cores.

        Scales that may still be missing are looked for in the usual way, and tensors that are more
        than their memory (sharded ones, fake ones) are cast so.
        """
        if type(input) is not Tensor or type(weight) not in (Tensor, Parameter):
            return False
        if torch.compiler.is_compiling() or (self.cold and scales is not None):
            return False
        return not self.emulates(input) and fuses_on(input.device)

    def make_memory(self, layer: Any, scales: Tensor | None = None) -> OperandMemory | None:
        """See `Kernel.make_memory`; scales are those of `ScaleHistory`."""
        return None if scales is None else OperandMemory(scales)

    def takes_stored(self, format: FloatFormat) -> bool:
        """See `Kernel.takes_stored`."""
        return format == self.weight and not self.through_bf16

    def multiply(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: str,
        memory: OperandMemory | None = None,
        *,
        record: bool = False,
        gathered: KeptCasts | None = None,
        **ignored: Any,
    ) -> Tensor:
        """See `Kernel.multiply`; without a memory scales are dynamic."""
        if input.numel() == 0 or weight.numel() == 0:
            return F.linear(input, weight, bias)
        input = input.to(compute_dtype(input))
        emulate = self.emulates(input)
        if not emulate:
            out_features, in_features = weight.shape
            check_alignment(layer, in_features=in_features, out_features=out_features)
        scales = leaf = share = None
        slot = 0
        if memory is not None and self.delayed:
            scales = memory.scales
            if not torch.compiler.is_compiling():
                if input.is_cuda and torch.cuda.is_current_stream_capturing():
                    memory.captured = True
                if memory.shares_weight_cast and record and not weight.is_inference():
                    share = memory
        in_full = memory is not None and record and not memory.amax_only
        # Without a gradient of its own a frozen backbone would keep its activations for the leaf.
        differentiable = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        if memory is not None and in_full and differentiable:
            leaf, slot = memory.grad_leaf, memory.next_slot()
        with without_autocast(input.device.type):
            rows = input.reshape(-1, input.shape[-1])
            how = scales, leaf, slot, self, emulate, in_full
            if isinstance(weight, StoredWeight):
                parts = weight.cast, weight.scale, weight.amax
                output, *recorded = StoredLinear.apply(rows, *parts, *how, layer)
            else:
                place = place_of(rows, weight)
                output, *recorded = _NativeLinear.apply(
                    rows, place, weight, *how, share, gathered, layer
                )
            output = output.reshape(*input.shape[:-1], weight.shape[0])
            if memory is not None and record:
                memory.record(*recorded)
            return output if bias is None else output + bias.to(output.dtype)

    def multiply_groups(
        self,
        input: Tensor,
        weight: Tensor,
        groups: Groups,
        layer: str,
        gathered: KeptCasts | None = None,
    ) -> Tensor:
        """See `Kernel.multiply_groups`; each expert's tensors have scales of their own."""
        input = input.to(compute_dtype(input))
        if not self.emulates(input):
            return super().multiply_groups(input, weight, groups, layer, gathered)
        x, w, g = (
            Cast(format=format, by_row=False, power_of_two=False)
            for format in (self.input, self.weight, self.grad_output)
        )
        casts = Casts(
            output=(x, w), grad_input=(g, w), grad_weight=None if self.high_grad_weight else (g, x)
        )
        exported = self.through_bf16
        with without_autocast(input.device.type):
            return emulated_groups(
                input, weight, groups, casts, layer, exported=exported, gathered=gathered
            )

    def exported(self, weight: Tensor) -> Tensor:
        """See `Kernel.exported`."""
        return through_bf16(weight) if self.through_bf16 else weight

    def padding(self, tokens: int, in_features: int, out_features: int) -> int:
        """See `Kernel.padding`; only the weight's gradient sums over tokens."""
        if self.high_grad_weight or not self.cuda_fp8:
            return 0
        return 2 * zeros_to(ALIGNMENT, tokens) * in_features * out_features

    def cast_of(self, operand: int, x: Tensor, scales: Tensor | None) -> tuple[Tensor, FloatFormat]:
        """See `Kernel.cast_of`."""
        format = (self.input, self.weight, self.grad_output)[operand]
        if scales is not None and self.delayed and not self.cold:
            return scales[operand], format
        given = scales if self.delayed else None
        amax = tensor_amax(self.exported(x) if operand == WEIGHT else x)
        return self.scale(amax, given, operand, format), format

    def scale(
        self, amax: Tensor, scales: Tensor | None, operand: int, format: FloatFormat
    ) -> Tensor:
        """The scale an operand is cast with; float32 scalar."""
        if scales is None:
            return amax_to_scale(amax, format.max)
        scale = scales[operand]
        if self.cold:
            scale = torch.where(scale > 0, scale, amax_to_scale(amax, format.max))
        return scale


@dataclass(frozen=True, slots=True)
class _Casts:
    """How the operands of one call are cast."""

    kernel: NativeKernel
    scales: Tensor | None
    wide: torch.dtype | None
    fused: bool
    record: bool

    def of(
        self,
        operand: int,
        x: Tensor,
        format: FloatFormat,
        *,
        rows: bool = True,
        columns: bool = True,
    ) -> Operand:
        """An operand in the layouts that are asked for."""
        if self.fused:
            scale = None if self.scales is None else self.scales[operand]
            how = {"rows": rows, "columns": columns, "record": self.record}
            return fused_operand(x, scale, format, **how)
        return torch_operand(
            x,
            lambda amax: self.kernel.scale(amax, self.scales, operand, format),
            format,
            self.wide,
            record=self.record,
        )

    def again(self, weight: Tensor, scale: Tensor, gathered: KeptCasts | None) -> Tensor | None:
        """A weight cast with the scale of its forward, to be summed over by columns."""
        format = self.kernel.weight
        kept = None if gathered is None else gathered.find(weight, (self.kernel, identity(scale)))
        if kept is not None:
            return widen(kept.cast, format, self.wide)
        exported = self.kernel.exported(weight)
        if self.fused:
            w = cast = fused_operand(exported, scale, format, rows=False, record=False).by_columns
        else:
            cast, w = cast_operand(exported, scale, format, self.wide)
        if gathered is not None and cast is not None:
            keys = ((self.kernel, identity(scale)),)
            gathered.keep(weight, keys, WeightOperand(cast, scale), (cast,))
        return w


def _row_of_cast(amax: Tensor, record: bool) -> Tensor:
    """See `amax_row`; of a weight that arrived in FP8. That something is not finite counts as 1."""
    return torch.stack([amax, 1 - torch.isfinite(amax).float()]) if record else amax


class _NativeLinear(torch.autograd.Function):
    """`input [M, K] @ weight [N, K].T -> [M, N]` with FP8 operands in all three products.

    Besides the product, forward returns the records of input and weight (their amaxes, where no
    more is wanted), and backward that of grad_output as the gradient of a leaf: purely functional.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        place: Tensor | None,
        weight: Tensor,
        scales: Tensor | None,
        leaf: Tensor | None,
        slot: int,
        kernel: NativeKernel,
        emulate: bool,
        in_full: bool,
        share: OperandMemory | None,
        gathered: KeptCasts | None,
        layer: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = operand_dtype(input) if emulate else None
        needs_input, _, needs_weight = ctx.needs_input_grad[:3]
        casts = _Casts(kernel, scales, wide, kernel.fuses(input, weight, scales), in_full)
        saves_cast = needs_weight and not kernel.high_grad_weight
        x = casts.of(INPUT, input, kernel.input, columns=saves_cast)
        kept = None
        if share is not None:
            kept = share.weight_cast_of(weight, kernel)
        elif gathered is not None:
            kept = gathered.find(weight, (kernel, identity(scales), in_full))
        if kept is None:
            cast_from = kernel.exported(weight)
            cast = casts.of(WEIGHT, cast_from, kernel.weight, columns=False)
            w8, w, amax_w, scale_w, row_w = cast.kept, cast.by_rows, cast.amax, cast.scale, cast.row
            if share is not None and w8 is not None:
                share.keep_weight_cast(weight, kernel, w8, scale_w, amax_w, row_w)
            elif gathered is not None and w8 is not None:
                keys = (kernel, identity(scales), in_full), (kernel, identity(scale_w))
                gathered.keep(
                    weight, keys, WeightOperand(w8, scale_w, amax_w, row_w, scales), (w8,)
                )
        else:
            w8, amax_w, scale_w, row_w = kept.cast, kept.amax, kept.scale, kept.row
            row_w = _row_of_cast(amax_w, in_full) if row_w is None else row_w
            w = widen(w8, kernel.weight, wide)
        unscale_x, unscale_w = unscale(x.scale, x.amax), unscale(scale_w, amax_w)
        saved_input = input if kernel.high_grad_weight else x.kept
        ctx.save_for_backward(
            saved_input if needs_weight else None,
            weight if needs_input else None,
            w8 if needs_input and share is not None else None,
            scale_w,
            unscale_x,
            unscale_w,
            scales,
        )
        ctx.kernel, ctx.wide, ctx.place, ctx.layer = kernel, wide, place, layer
        ctx.fused, ctx.gathered = casts.fused, gathered
        ctx.slot = None if leaf is None else slot
        ctx.dtypes = input.dtype, weight.dtype
        assert x.by_rows is not None and w is not None
        output = forward_products(x.by_rows, w, unscale_x, unscale_w, input.dtype)
        rows = x.row, row_w if share is gathered is None else row_w.clone()
        ctx.mark_non_differentiable(*rows)
        return output, *rows

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *row_gradients: Any) -> tuple[Tensor | None, ...]:
        saved_input, weight, w8, scale_w, unscale_x, unscale_w, scales = ctx.saved_tensors
        refuse_transforms(ctx.layer, grad_output)
        kernel, wide = ctx.kernel, ctx.wide
        input_dtype, weight_dtype = ctx.dtypes
        grad_input: Tensor | None = None
        grad_weight: Tensor | None = None
        grad_leaf: Tensor | None = None
        with torch.no_grad(), without_autocast(grad_output.device.type):
            casts = _Casts(kernel, scales, wide, ctx.fused, ctx.slot is not None)
            by_columns = saved_input is not None and not kernel.high_grad_weight
            g = casts.of(
                GRAD_OUTPUT,
                grad_output,
                kernel.grad_output,
                rows=weight is not None,
                columns=by_columns,
            )
            unscale_g = unscale(g.scale, g.amax)
            w = x = None
            if weight is not None and w8 is None:
                w = casts.again(weight, scale_w, ctx.gathered)
            elif weight is not None:
                w = widen(w8, kernel.weight, wide)
            if saved_input is not None and not kernel.high_grad_weight:
                x = widen(saved_input, kernel.input, wide)
            grad_input, grad_weight = backward_products(
                g.by_rows, g.by_columns, x, w, unscale_g, unscale_x, unscale_w, ctx.dtypes
            )
            if saved_input is not None and kernel.high_grad_weight:
                grad_weight = (grad_output.t() @ saved_input).to(weight_dtype)
            if ctx.slot is not None:
                grad_leaf = for_leaf(ctx, g.row)
        if differentiated_again():
            if ctx.gathered is not None:
                ctx.gathered.use_values()
            x = saved_input
            if x is not None and not kernel.high_grad_weight:
                x = in_place_of(
                    (widen(x, kernel.input, wide).float() * unscale_x).to(input_dtype), ctx.place
                )
            grad_input, grad_weight = gradients_again(
                grad_input, grad_weight, grad_output, x, weight
            )
        return grad_input, None, grad_weight, None, grad_leaf, *[None] * 7
