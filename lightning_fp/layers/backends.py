"""From a format and a backend to the kernel that runs it here."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_fp.kernels import (
    HighPrecisionKernel,
    Kernel,
    NativeKernel,
    SimulatedKernel,
    TorchaoKernel,
)
from lightning_fp.kernels.torchao import import_float8
from lightning_fp.layers.format import LinearFormat
from lightning_fp.numerics import float_format

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig

Backend = Literal["auto", "native", "torchao", "transformer-engine"]


def check_backend(backend: str) -> None:
    """Refuse a backend that does not exist, or not in this version.

    Raises:
        ValueError: naming the backends there are.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend == "transformer-engine":
        raise ValueError(
            "backend 'transformer-engine' is not part of this version; take 'auto', 'native' or"
            " 'torchao'"
        )


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
    check_backend(backend)
    if format.is_high_precision:
        dtype = None if format.input == "high" else float_format(format.input).dtype
        return HighPrecisionKernel(dtype=dtype)
    if format.scaling == "none":
        return SimulatedKernel(
            input=float_format(format.input),
            weight=float_format(format.weight),
            grad_output=float_format(format.grad_output),
            rounding=format.rounding,
        )
    if format.torchao is not None and backend == "native":
        raise ValueError(
            f"backend must be 'auto' or 'torchao' for a torchao config, got {backend!r}"
        )
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
    if backend == "torchao" or format.torchao is not None or not native_can:
        return TorchaoKernel(config=_torchao_config(format), cuda_fp8=cuda_fp8)
    return NativeKernel(
        input=float_format(format.input),
        weight=float_format(format.weight),
        grad_output=float_format(format.grad_output),
        high_grad_weight=format.grad_weight == "high",
        delayed=format.scaling == "delayed",
        cold=format.scaling == "delayed",
        cuda_fp8=cuda_fp8,
    )


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
