"""torchao's own float8 function, for every format that its config can say.

`matmul_with_hp_or_float8_args` and `LinearMMConfig` are not public in torchao, so the dependency
on them stays in this one file.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fp.format_names import ALIGNMENT
from lightning_fp.kernels.base import Kernel, compute_dtype, without_autocast
from lightning_fp.kernels.derivatives import gradients_again, refuse_transforms
from lightning_fp.kernels.float8_free import Cast, Casts, float8_free_linear
from lightning_fp.kernels.gathered_casts import KeptCasts
from lightning_fp.kernels.grouped.emulated import emulated_groups
from lightning_fp.kernels.grouped.groups import Groups
from lightning_fp.kernels.grouped.torchao import has_grouped_fp8, torchao_groups
from lightning_fp.kernels.hardware import check_alignment
from lightning_fp.kernels.memory import WEIGHT
from lightning_fp.kernels.padding import zeros_to
from lightning_fp.kernels.plain_linear import differentiated_again
from lightning_fp.kernels.quiet import import_quietly
from lightning_fp.numerics import (
    FORMATS,
    FloatFormat,
    amax_to_scale,
    format_of_dtype,
    row_amax,
    tensor_amax,
    through_bf16,
)
from lightning_fp.numerics.devices import has_dtype

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig


@dataclass(frozen=True, kw_only=True)
class TorchaoKernel(Kernel):
    """A float8 linear as torchao computes it, configured by a `Float8LinearConfig`."""

    config: Float8LinearConfig
    """torchao's config. `emulate` is set here, by what the device can do."""

    cuda_fp8: bool = False
    """Whether CUDA tensors go to FP8 tensor cores; everything else is emulated."""

    through_bf16: bool = False
    """Whether weights are rounded to bf16 before they are cast, as an engine receives them. torchao
    keeps the rounded copy for backward."""

    _function: Any = field(init=False, repr=False, compare=False)
    _configs: dict[bool, tuple[Float8LinearConfig, Any]] = field(
        init=False, repr=False, compare=False
    )

    _casts: Casts = field(init=False, repr=False, compare=False)
    _formats: frozenset[FloatFormat] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.config.enable_fsdp_float8_all_gather:
            raise ValueError(
                "enable_fsdp_float8_all_gather must be False, got True; the weight would arrive in"
                " FP8 and the layer could never return to high precision"
            )
        _patch_inductor()
        # Looked up here and not in the call, which torch.compile traces.
        float8_linear = import_float8().float8_linear
        object.__setattr__(self, "_function", float8_linear.matmul_with_hp_or_float8_args)
        configs = {emulate: _configs(self.config, emulate) for emulate in (False, True)}
        object.__setattr__(self, "_configs", configs)
        casts = _casts(self.config)
        formats = frozenset(
            cast.format for pair in (casts.output, casts.grad_input) for cast in pair
        )
        object.__setattr__(self, "_casts", casts)
        object.__setattr__(self, "_formats", formats)

    @property
    def name(self) -> str:
        """See `Kernel.name`."""
        return "torchao" if self.runs_on_fp8_hardware else "torchao (emulated)"

    @property
    def name_for_groups(self) -> str:
        """See `Kernel.name_for_groups`; the emulation is ours, of the same casts."""
        if not self.runs_on_fp8_hardware:
            return "native (emulated)"
        return "torchao (grouped)" if self._groups_on_cuda else super().name_for_groups

    @property
    def _groups_on_cuda(self) -> bool:
        return self._casts == _GROUPED_ON_CUDA and has_grouped_fp8()

    @property
    def runs_on_fp8_hardware(self) -> bool:
        """See `Kernel.runs_on_fp8_hardware`."""
        return self.cuda_fp8 and not self.config.emulate

    def emulates(self, input: Tensor) -> bool:
        """Whether the products with this input are emulated."""
        return not (self.runs_on_fp8_hardware and input.is_cuda)

    @property
    def _by_row(self) -> bool:
        """Whether products have a scale per row: torch returns bf16 alone of these, mostly."""
        return self.config.cast_config_input.scaling_granularity.value == "axiswise"

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
        if not emulate and not self.config.pad_inner_dim:
            out_features, in_features = weight.shape
            check_alignment(layer, in_features=in_features, out_features=out_features)
        if self.through_bf16:
            weight = _Exported.apply(weight)
        input = input.to(dtype if emulate or not self._by_row else torch.bfloat16)
        config, gemm_config = self._configs[emulate]
        with without_autocast(input.device.type), _outside_inference_mode():
            # Contiguous, because torchao's cast by rows takes nothing else.
            rows = input.reshape(-1, input.shape[-1]).contiguous()
            if emulate and not all(has_dtype(format, input.device) for format in self._formats):
                output = float8_free_linear(rows, weight, self._casts, layer)
            elif torch.compiler.is_compiling():
                # A copy, which the compiler leaves out, since a view could not be changed in place.
                output = self._function.apply(rows, weight.t(), gemm_config, config).clone()
            else:
                how = gemm_config, config, layer, gathered
                output = _TwiceDifferentiable.apply(rows, weight.t(), *how)
            output = output.reshape(*input.shape[:-1], weight.shape[0]).to(dtype)
            return output if bias is None else output + bias.to(output.dtype)

    def multiply_groups(
        self,
        input: Tensor,
        weight: Tensor,
        groups: Groups,
        layer: str,
        gathered: KeptCasts | None = None,
    ) -> Tensor:
        """See `Kernel.multiply_groups`."""
        input = input.to(compute_dtype(input))
        if self.emulates(input):
            casts, exported = self._casts, self.through_bf16
            with without_autocast(input.device.type):
                return emulated_groups(
                    input, weight, groups, casts, layer, exported=exported, gathered=gathered
                )
        if self._groups_on_cuda:
            weight = _Exported.apply(weight) if self.through_bf16 else weight
            return torchao_groups(input, weight, groups, layer, "rowwise")
        return super().multiply_groups(input, weight, groups, layer, gathered)

    def exported(self, weight: Tensor) -> Tensor:
        """See `Kernel.exported`."""
        return through_bf16(weight) if self.through_bf16 else weight

    def padding(self, tokens: int, in_features: int, out_features: int) -> int:
        """See `Kernel.padding`; with `pad_inner_dim` features are filled up as well."""
        if not self.runs_on_fp8_hardware:
            return 0
        features = ALIGNMENT if self.config.pad_inner_dim else 1
        zeros = zeros_to(features, in_features) * tokens * out_features
        zeros += zeros_to(features, out_features) * tokens * in_features
        if self._casts.grad_weight is not None:
            zeros += zeros_to(ALIGNMENT, tokens) * in_features * out_features
        return 2 * zeros

    def cast_of(self, operand: int, x: Tensor, scales: Tensor | None) -> tuple[Tensor, FloatFormat]:
        """See `Kernel.cast_of`."""
        cast = (*self._casts.output, self._casts.grad_input[0])[operand]
        x = self.exported(x) if operand == WEIGHT else x
        amax = row_amax(x) if cast.by_row else tensor_amax(x)
        scale = amax_to_scale(amax, cast.format.max, power_of_two=cast.power_of_two)
        return scale, cast.format


_ROWWISE = Cast(format=FORMATS["e4m3"], by_row=True, power_of_two=True)
_GROUPED_ON_CUDA = Casts(
    output=(_ROWWISE, _ROWWISE), grad_input=(_ROWWISE, _ROWWISE), grad_weight=(_ROWWISE, _ROWWISE)
)
"""The casts of torchao's grouped product, which leaves nothing to choose."""


class _Exported(torch.autograd.Function):
    """What bf16 leaves of a weight, in the weight's own dtype; gradients go straight through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return through_bf16(weight).to(weight.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        return grad


def _outside_inference_mode() -> AbstractContextManager[object]:
    """In inference mode torchao's tensors that are scaled by rows cannot be reshaped."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


class _TwiceDifferentiable(torch.autograd.Function):
    """torchao's function, whose backward can be differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight_t: Tensor,
        gemms: Any,
        config: Any,
        layer: str,
        gathered: KeptCasts | None,
    ) -> Tensor:
        ctx.layer, ctx.gathered = layer, gathered
        ctx.function = import_float8().float8_linear.matmul_with_hp_or_float8_args
        ctx.linear_mm_config, ctx.config = gemms, config
        ctx.save_for_backward(input, weight_t)  # torchao would save what may be a cast
        theirs = SimpleNamespace(save_for_backward=lambda *_: None)
        weight_t = _cast_once(weight_t, gemms, config, gathered, for_grad_input=False)
        # Its data, since it is a view: one made in here could not be changed in place.
        return ctx.function.forward(theirs, input, weight_t, gemms, config).data

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        refuse_transforms(ctx.layer, grad_output)
        # Checkpointing gives saved tensors out once, and both want them.
        input, weight_t = ctx.saved_tensors
        with torch.no_grad():
            how = ctx.linear_mm_config, ctx.config, ctx.gathered
            weight = _cast_once(weight_t, *how, for_grad_input=True)
            theirs = SimpleNamespace(**vars(ctx), saved_tensors=(input, weight))
            grad_input, grad_weight_t, *_ = ctx.function.backward(theirs, grad_output)
        needs_input, needs_weight, *_ = ctx.needs_input_grad
        if differentiated_again():
            grad_input, grad_weight = gradients_again(
                grad_input if needs_input else None,
                grad_weight_t.t() if needs_weight else None,
                grad_output,
                input,
                weight_t.t(),
            )
            grad_weight_t = None if grad_weight is None else grad_weight.t()
        return grad_input, grad_weight_t, None, None, None, None


def _cast_once(
    weight_t: Tensor,
    gemms: Any,
    config: Any,
    gathered: KeptCasts | None,
    *,
    for_grad_input: bool,
) -> Tensor:
    """A weight that FSDP2 has gathered, as torchao casts it for a product; others as they are.

    Args:
        weight_t: [in_features, out_features].
        gemms: how torchao multiplies.
        config: how it casts.
        gathered: the casts that are kept; None: torchao casts it itself.
        for_grad_input: whether it is multiplied in backward.
    """
    of = config.cast_config_weight_for_grad_input if for_grad_input else config.cast_config_weight
    if gathered is None or of.scaling_type.value == "disabled":
        return weight_t
    from torchao.float8.float8_scaling_utils import (
        get_maybe_axiswise_dim,
        hp_tensor_to_float8_dynamic,
    )
    from torchao.float8.float8_training_tensor import GemmInputRole

    dim = get_maybe_axiswise_dim(-1 if for_grad_input else 0, of.scaling_granularity)
    return gathered.of(
        weight_t,
        (of.target_dtype, gemms, config.round_scales_to_power_of_2, dim),
        lambda: hp_tensor_to_float8_dynamic(
            weight_t,
            of.target_dtype,
            gemms,
            gemm_input_role=GemmInputRole.WEIGHT,
            scaling_granularity=of.scaling_granularity,
            axiswise_dim=dim,
            round_scales_to_power_of_2=config.round_scales_to_power_of_2,
        ),
        lambda cast: (cast._data, cast._scale),
    )


@cache
def import_float8() -> Any:
    """torchao.float8, imported late."""
    import_quietly("torchao.float8.float8_linear")
    return import_quietly("torchao.float8")


def _casts(config: Float8LinearConfig) -> Casts:
    """What its config says of each operand of each product."""

    def cast(of: Any) -> Cast:
        return Cast(
            format=format_of_dtype(of.target_dtype),
            by_row=of.scaling_granularity.value == "axiswise",
            power_of_two=config.round_scales_to_power_of_2,
        )

    grad_weight = (
        config.cast_config_grad_output_for_grad_weight,
        config.cast_config_input_for_grad_weight,
    )
    high = any(of is not None and of.scaling_type.value == "disabled" for of in grad_weight)
    return Casts(
        output=(cast(config.cast_config_input), cast(config.cast_config_weight)),
        grad_input=(
            cast(config.cast_config_grad_output),
            cast(config.cast_config_weight_for_grad_input),
        ),
        grad_weight=None if high else (cast(grad_weight[0]), cast(grad_weight[1])),
    )


def _configs(config: Float8LinearConfig, emulate: bool) -> tuple[Float8LinearConfig, Any]:
    """torchao's layer config and the GEMM config it implies, as Float8Linear derives it."""
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    config = dataclasses.replace(config, emulate=emulate)
    gemms = (
        config.gemm_config_output,
        config.gemm_config_grad_input,
        config.gemm_config_grad_weight,
    )
    # The weight's gradient is summed over the tokens, of which there may be any number.
    padded = config.pad_inner_dim, config.pad_inner_dim, not emulate or config.pad_inner_dim
    return config, LinearMMConfig(
        *(
            ScaledMMConfig(config.emulate, gemm.use_fast_accum, False, pad)
            for gemm, pad in zip(gemms, padded, strict=True)
        )
    )


@cache
def _patch_inductor() -> None:
    """Work around Triton's FP8 store bug (triton#11111), as convert_to_float8_training does."""
    if not torch.cuda.is_available():
        return  # no Triton, and importing Inductor takes longer than converting a model
    import_float8()
    try:
        from torchao.float8._inductor_patch import _patch_inductor_min_max_codegen
    except ImportError:  # torchao releases before or after the bug
        return
    _patch_inductor_min_max_codegen()
