"""From a format and a backend to the kernel that runs it here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_fp.choices import check_choice
from lightning_fp.format_names import TE_FORMATS
from lightning_fp.kernels import (
    MX_EMULATION,
    BlockKernel,
    HighPrecisionKernel,
    Kernel,
    NativeKernel,
    SimulatedKernel,
    TorchaoKernel,
    TorchaoMXKernel,
)
from lightning_fp.kernels.hardware import (
    cuda_block_refusal,
    cuda_mx_refusal,
    cuda_product_refusal,
)
from lightning_fp.kernels.torchao import import_float8
from lightning_fp.kernels.transformer_engine.kernel import (
    NVFP4_CASTS,
    TransformerEngineKernel,
    refusal,
)
from lightning_fp.kernels.transformer_engine.recipe import RecipeSettings
from lightning_fp.layers.format import NAMED_FORMATS, LinearFormat
from lightning_fp.numerics import float_format

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig

Backend = Literal["auto", "native", "torchao", "transformer-engine"]

BackendLike = Literal["auto", "native", "torchao", "transformer-engine", "te"]
"""What users may write."""


def read_backend(backend: str) -> Backend:
    """The backend that a user's value stands for.

    Raises:
        ValueError: if there is no such backend, naming those there are.
    """
    name: Any = "transformer-engine" if backend == "te" else backend
    check_choice("backend", name, get_args(Backend))
    return name


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A format with what multiplies it here: asked for once, and carried from there on."""

    format: LinearFormat
    kernel: Kernel

    @property
    def refusal(self) -> str | None:
        """Why this machine cannot run it, though there is a kernel; None if it can."""
        if not isinstance(self.kernel, TransformerEngineKernel):
            return None
        return refusal(self.kernel.settings.format)

    @property
    def alignment(self) -> int:
        """What in_features and out_features must be multiples of; 1 where it is emulated."""
        return self.format.row.alignment if self.kernel.runs_on_fp8_hardware else 1

    def fits(self, in_features: int, out_features: int) -> bool:
        """Whether a layer of this shape can run it."""
        return not (in_features % self.alignment or out_features % self.alignment)


def resolve(format: LinearFormat, backend: Backend, *, cuda_fp8: bool) -> Resolved:
    """A format with its kernel; see `kernel_for`."""
    return Resolved(format=format, kernel=kernel_for(format, backend, cuda_fp8=cuda_fp8))


@cache
def kernel_for(format: LinearFormat, backend: Backend, *, cuda_fp8: bool) -> Kernel:
    """The kernel that multiplies `format`.

    Args:
        format: the layer's format.
        backend: "auto" takes our own kernel for per-tensor scales and torchao's for the rest.
        cuda_fp8: whether CUDA tensors can go to FP8 tensor cores, see
            `lightning_fp.kernels.hardware`.

    Returns:
        A kernel; equal arguments give equal kernels.

    Raises:
        ValueError: if the backend cannot run the format.
    """
    backend = read_backend(backend)
    if format.is_high_precision:
        dtype = None if format.input == "high" else float_format(format.input).dtype
        return HighPrecisionKernel(dtype=dtype)
    if format.is_simulated:
        return SimulatedKernel(
            input=float_format(format.input),
            weight=float_format(format.weight),
            grad_output=float_format(format.grad_output),
            rounding=format.rounding,
            scaled=format.scaling == "dynamic",
            power_of_two=format.power_of_two,
        )
    if backend == "transformer-engine":
        return _transformer_engine_kernel(format)
    if format.recipe is not None:
        raise ValueError(
            f"backend must be 'transformer-engine' for a recipe of Transformer Engine, got"
            f" {backend!r}"
        )
    if format.torchao is not None and backend == "native":
        raise ValueError(
            f"backend must be 'auto' or 'torchao' for a torchao config, got {backend!r}"
        )
    if format.granularity == "nv":
        raise ValueError(
            f"backend {backend!r} cannot run {format.name!r}: only Transformer Engine multiplies in"
            " it, on sm100 or later; take backend='transformer-engine', or 'fp8-dynamic'"
        )
    if format.granularity == "block":
        return _block_kernel(format, backend, cuda_fp8=cuda_fp8)
    if format.granularity == "mx":
        return _mx_kernel(format, backend, cuda_fp8=cuda_fp8)
    through_bf16 = format.quantise_like == "bf16-export"
    native_can = format.granularity == "tensor" and not format.power_of_two
    if format.scaling == "delayed" and (backend == "torchao" or not native_can):
        raise ValueError(
            f"backend {backend!r} cannot run {format.name!r}: only our native kernel has delayed"
            " scaling, with scales of any factor; take backend='auto'"
        )
    if backend == "native" and not native_can:
        raise ValueError(
            f"backend 'native' cannot run {format.name!r}: it scales per tensor, by any factor;"
            " take backend='auto' or 'torchao'"
        )
    why = cuda_product_refusal(
        format.input,
        format.weight,
        format.grad_output,
        high_grad_weight=format.grad_weight == "high",
        by_row=format.granularity == "row",
    )
    emulated = format.torchao is not None and format.torchao.emulate
    if cuda_fp8 and not emulated and why is not None:
        raise ValueError(f"format {format.name!r} cannot run on FP8 hardware: {why}")
    if backend == "torchao" or format.torchao is not None or not native_can:
        return TorchaoKernel(
            config=_torchao_config(format), cuda_fp8=cuda_fp8, through_bf16=through_bf16
        )
    return NativeKernel(
        input=float_format(format.input),
        weight=float_format(format.weight),
        grad_output=float_format(format.grad_output),
        high_grad_weight=format.grad_weight == "high",
        delayed=format.scaling == "delayed",
        cold=format.scaling == "delayed",
        cuda_fp8=cuda_fp8,
        through_bf16=through_bf16,
    )


def could_run(format: LinearFormat, backend: Backend) -> bool:
    """Whether the backend has a kernel for a format on FP8 hardware, whatever is here.

    Advice is taken to the machine that trains, and there it must hold.
    """
    try:
        kernel_for(format, backend, cuda_fp8=True)
    except ValueError:
        return False
    return True


def _transformer_engine_kernel(format: LinearFormat) -> Kernel:
    """One of its recipes, which leave little to choose."""
    names = format.row.te
    if names is None or format.torchao is not None:
        raise ValueError(
            f"backend 'transformer-engine' cannot run {format.name!r}: it has no such recipe; take"
            f" one of {', '.join(TE_FORMATS)}, or backend='auto'"
        )
    kind = names.kind
    if kind == "nvfp4":
        if format != NAMED_FORMATS["nvfp4"]:
            raise ValueError(
                f"backend 'transformer-engine' cannot run {format.name!r}: its NVFP4 recipe leaves"
                " nothing to choose; take 'nvfp4'"
            )
        return TransformerEngineKernel(settings=RecipeSettings(kind=kind), shadow=NVFP4_CASTS)
    if format.quantise_like != "master":
        raise ValueError(
            f"backend 'transformer-engine' cannot run {format.name!r}: it casts the weight as it"
            " is; take quantise_like='master', a base of 'bf16-true', or backend='auto'"
        )
    operands = format.input, format.weight, format.grad_weight
    if operands != ("e4m3", "e4m3", "fp8") or format.grad_output not in ("e4m3", "e5m2"):
        raise ValueError(
            f"backend 'transformer-engine' cannot run {format.name!r}: in its recipes input and"
            " weight are e4m3, grad_output is e5m2 or e4m3, and grad_weight is multiplied in FP8;"
            " take backend='auto'"
        )
    if kind == "delayed" and format.power_of_two:
        raise ValueError(
            f"backend 'transformer-engine' cannot run {format.name!r}: its delayed scaling has"
            " scales of any factor; take 'fp8-dynamic[power_of_two=true]'"
        )
    plain = "torchao" if kind == "current" and format.power_of_two else "native"
    return TransformerEngineKernel(
        settings=RecipeSettings(
            kind=kind,
            grad_output="e5m2" if format.grad_output == "e5m2" else "e4m3",
            power_of_two=format.power_of_two,
            given=format.recipe,
        ),
        shadow=kernel_for(dataclasses.replace(format, recipe=None), plain, cuda_fp8=False),
    )


def _block_kernel(format: LinearFormat, backend: Backend, *, cuda_fp8: bool) -> Kernel:
    """Blocks of 128: ours, on Hopper's tensor cores or emulated."""
    if backend == "torchao":
        raise ValueError(
            f"backend 'torchao' cannot run {format.name!r}: it has no such linear layer outside of"
            " its prototypes; take backend='native', which emulates it"
        )
    high = format.grad_weight == "high"
    on_cards = cuda_fp8 and backend == "auto"
    if on_cards:
        operands = format.input, format.weight, format.grad_output
        why = cuda_block_refusal() or cuda_product_refusal(*operands, high_grad_weight=high)
        if why is not None:
            raise ValueError(
                f"format {format.name!r} cannot run on FP8 hardware here: {why}; take"
                " backend='transformer-engine', 'fp8-rowwise', or backend='native' to emulate it"
            )
    return BlockKernel(
        input=float_format(format.input),
        weight=float_format(format.weight),
        grad_output=float_format(format.grad_output),
        scales="power_of_two" if format.power_of_two else "any",
        high_grad_weight=high,
        through_bf16=format.quantise_like == "bf16-export",
        cuda_fp8=on_cards,
    )


def _mx_kernel(format: LinearFormat, backend: Backend, *, cuda_fp8: bool) -> Kernel:
    """Blocks of 32: torchao's op on the hardware for it, ours to emulate it."""
    high = format.grad_weight == "high"
    through_bf16 = format.quantise_like == "bf16-export"
    if through_bf16 and (backend == "torchao" or (backend == "auto" and cuda_fp8)):
        raise ValueError(
            f"backend {backend!r} cannot run {format.name!r}: torchao's MXFP8 casts the weight as"
            " it is; take quantise_like='master', or backend='native' to emulate it"
        )
    if backend == "native" or (backend == "auto" and not cuda_fp8):
        return dataclasses.replace(
            MX_EMULATION,
            input=float_format(format.input),
            weight=float_format(format.weight),
            grad_output=float_format(format.grad_output),
            high_grad_weight=high,
            through_bf16=through_bf16,
        )
    if {format.input, format.weight, format.grad_output} != {"e4m3"}:
        raise ValueError(
            f"backend {backend!r} cannot run {format.name!r}: torchao's MXFP8 has e4m3 for all"
            " operands; take 'mxfp8', or backend='native' to emulate it"
        )
    refusal = cuda_mx_refusal() if cuda_fp8 else None
    if refusal is not None:
        raise ValueError(
            f"format {format.name!r} cannot run here: {refusal}; take 'fp8-rowwise', or"
            " backend='native' to emulate it"
        )
    return TorchaoMXKernel(high_grad_weight=high, cuda_mx=cuda_fp8)


def _torchao_config(format: LinearFormat) -> Float8LinearConfig:
    """The Float8LinearConfig that says `format`."""
    if format.torchao is not None:
        return format.torchao
    float8 = import_float8()
    by_row = format.granularity == "row"
    granularity = (
        float8.ScalingGranularity.AXISWISE if by_row else float8.ScalingGranularity.TENSORWISE
    )

    def cast(operand: str, **changes: Any) -> Any:
        # One CastConfig per operand: torchao fills in defaults by changing the object, so a
        # shared one would silently give the gradient the input's dtype.
        dtype = float_format(operand).dtype
        return float8.CastConfig(
            **{"scaling_granularity": granularity, "target_dtype": dtype, **changes}
        )

    high: dict[str, Any] = {}
    if format.grad_weight == "high":
        disabled = {
            "scaling_type": float8.ScalingType.DISABLED,
            "scaling_granularity": float8.ScalingGranularity.TENSORWISE,
        }
        high = {
            "cast_config_input_for_grad_weight": cast(format.input, **disabled),
            "cast_config_grad_output_for_grad_weight": cast(format.grad_output, **disabled),
        }
        if by_row:
            # As in torchao's rowwise_with_gw_hp: the weight of grad_input is scaled per tensor.
            tensorwise = {"scaling_granularity": float8.ScalingGranularity.TENSORWISE}
            high["cast_config_weight_for_grad_input"] = cast(format.weight, **tensorwise)
    return float8.Float8LinearConfig(
        cast_config_input=cast(format.input),
        cast_config_weight=cast(format.weight),
        cast_config_grad_output=cast(format.grad_output),
        round_scales_to_power_of_2=format.power_of_two,
        **high,
    )
