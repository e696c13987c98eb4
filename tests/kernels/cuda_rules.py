"""The hardware's branch on a CPU: torch's own FP8 product, behind CUDA's rules for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from lightning_fp.kernels import (
    MX_EMULATION,
    BlockKernel,
    Kernel,
    NativeKernel,
    TorchaoKernel,
    TorchaoMXKernel,
)
from lightning_fp.numerics import spread_blocks

NAMES = [argument.name for argument in torch.ops.aten._scaled_mm.default._schema.arguments]


class OnHardware(NativeKernel):
    """Takes the branch of FP8 tensor cores on every device."""

    def emulates(self, input: Tensor) -> bool:
        return False


class BlocksOnHardware(BlockKernel):
    """Blocks of 128, likewise."""

    def emulates(self, input: Tensor) -> bool:
        return False


class TorchaoOnHardware(TorchaoKernel):
    """torchao's, likewise."""

    def emulates(self, input: Tensor) -> bool:
        return False


class MXOnHardware(TorchaoMXKernel):
    """torchao's op for MX formats, likewise: given what hardware is given, and then emulated.

    torch has no product of them on a CPU, so that our emulation stands in for the whole op.
    """

    def __post_init__(self) -> None:
        super().__post_init__()

        def checked(x: Tensor, weight: Tensor, **_: Any) -> Tensor:
            for each in (x, weight):
                assert each.dtype is torch.bfloat16
                assert each.is_contiguous()
                assert each.shape[0] % 32 == each.shape[1] % 32 == 0, each.shape
            return MX_EMULATION(x, weight, None, "stands in")

        object.__setattr__(self, "_op", checked)

    def emulates(self, input: Tensor) -> bool:
        return False


def on_hardware(kernel: Kernel) -> Kernel:
    """The kernel that multiplies the same format on FP8 hardware, of one that emulates it."""
    for kind, there in ((NativeKernel, OnHardware), (BlockKernel, BlocksOnHardware)):
        if isinstance(kernel, kind) and kernel != MX_EMULATION:
            fields = {each.name: getattr(kernel, each.name) for each in dataclasses.fields(kernel)}
            return there(**{**fields, "cuda_fp8": True})
    if isinstance(kernel, TorchaoKernel):
        return TorchaoOnHardware(config=kernel.config, cuda_fp8=True)
    assert kernel == MX_EMULATION
    return MXOnHardware(cuda_mx=True)


class CudaRules:
    """Refuses what `torch._scaled_mm` refuses on CUDA, with scales per tensor or per row.

    Of `_check_scaled_mm_sizes` in torch/_meta_registrations.py and of
    aten/src/ATen/native/cuda/ScaledBlas.cpp. It stands in front of the function itself, for modes
    see neither torchao's products, inside of its tensors, nor calls in a backward.
    """

    def __init__(self) -> None:
        self.products = 0
        self.shapes: list[tuple[int, int, int]] = []
        """[M, K] by [K, N], of each."""
        self.multiply, self.multiply_blocks = torch._scaled_mm, torch._scaled_mm_v2

    def __enter__(self) -> CudaRules:
        torch._scaled_mm, torch._scaled_mm_v2 = self, self.blocks
        return self

    def __exit__(self, *_: object) -> None:
        torch._scaled_mm, torch._scaled_mm_v2 = self.multiply, self.multiply_blocks

    def blocks(
        self,
        a: Tensor,
        b: Tensor,
        scale_a: list[Tensor],
        recipe_a: list[int],
        swizzle_a: list[int],
        scale_b: list[Tensor],
        recipe_b: list[int],
        swizzle_b: list[int],
        bias: Tensor | None,
        out: torch.dtype,
        *_: object,
    ) -> Tensor:
        """Hopper's product with a scale per 128 values: refuses what it does, and is float32.

        Of the same two files. No CPU has it.
        """
        self.products += 1
        (scale_a, scale_b), (m, k), n = (scale_a[0], scale_b[0]), a.shape, b.shape[1]
        self.shapes.append((m, k, n))
        assert {a.dtype, b.dtype} <= {torch.float8_e4m3fn, torch.float8_e5m2}
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert k % 128 == n % 16 == m % 4 == 0, (m, k, n)
        assert recipe_a == [torch.nn.functional.ScalingType.BlockWise1x128.value]
        assert swizzle_a == swizzle_b == []
        assert bias is None
        assert out in (torch.bfloat16, torch.float32)
        square = recipe_b == [torch.nn.functional.ScalingType.BlockWise128x128.value]
        assert square or recipe_b == recipe_a
        whole = -(-(k // 128) // 4) * 4
        shape_b = (whole, -(-n // 128)) if square else (n, k // 128)
        for scale, shape in ((scale_a, (m, k // 128)), (scale_b, shape_b)):
            assert scale.dtype is torch.float32
            assert scale.shape == shape
            assert scale.t().is_contiguous(), scale.stride()
        by_row = spread_blocks(scale_a, (1, 128), a.shape)
        if square:
            by_column = spread_blocks(scale_b[: k // 128], (128, 128), b.shape)
        else:
            by_column = spread_blocks(scale_b, (1, 128), b.t().shape).t()
        return ((a.float() * by_row) @ (b.float() * by_column)).to(out)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.products += 1
        given = dict(zip(NAMES, args, strict=False), **kwargs)
        a, b = given.pop("self"), given.pop("mat2")
        self.shapes.append((a.shape[0], a.shape[1], b.shape[1]))
        self.check(a, b, **given)
        # The CPU's kernel does not know fast accumulation, which changes no rule.
        return self.multiply(a, b, **{**given, "use_fast_accum": False})

    @staticmethod
    def check(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, **options: Any) -> None:
        dtypes = {a.dtype, b.dtype}
        assert dtypes <= {torch.float8_e4m3fn, torch.float8_e5m2}, f"operands are {dtypes}"
        assert dtypes != {torch.float8_e5m2}, "e5m2 x e5m2"
        assert a.stride(0) > a.stride(1) == 1, f"first operand: strides {a.stride()}"
        assert b.stride(1) > b.stride(0) == 1, f"second operand: strides {b.stride()}"
        assert a.shape[1] % 16 == b.shape[0] % 16 == b.shape[1] % 16 == 0, (a.shape, b.shape)
        assert scale_a.dtype is scale_b.dtype is torch.float32
        out = options.get("out_dtype")
        if scale_a.numel() == scale_b.numel() == 1:
            assert out in (torch.bfloat16, torch.float16, torch.float32), f"out_dtype {out}"
            return
        assert (scale_a.shape, scale_b.shape) == ((a.shape[0], 1), (1, b.shape[1]))
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        assert b.dtype is torch.float8_e4m3fn
        assert out is torch.bfloat16, f"out_dtype {out}, which needs sm90 and cuBLAS 12.9"


class _Ruled(torch.fx.Interpreter):
    """Runs a graph, its FP8 products behind the rules."""

    rules = CudaRules()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten._scaled_mm.default:
            return self.rules(*args, **kwargs)
        if target is torch.ops.aten._scaled_mm_v2.default:
            return self.rules.blocks(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def ruled() -> Any:
    """A backend for torch.compile that runs the graphs of forward and backward as they are."""

    def run(graph: torch.fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(_Ruled(graph).run)

    return aot_autograd(fw_compiler=run, bw_compiler=run)
