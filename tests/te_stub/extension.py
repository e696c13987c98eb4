"""A stub of `transformer_engine_torch`, so that Transformer Engine's own Python code runs here.

Its C++ extension cannot be built without CUDA, and its Python code asks for CUDA throughout. This
gives it both, within one process made for the purpose: the few functions that a linear layer calls
are emulated on the CPU, every other name exists and does nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "kByte": (0, torch.uint8),
    "kInt32": (2, torch.int32),
    "kFloat32": (4, torch.float32),
    "kFloat16": (5, torch.float16),
    "kBFloat16": (6, torch.bfloat16),
    "kFloat8E4M3": (7, torch.float8_e4m3fn),
    "kFloat8E5M2": (8, torch.float8_e5m2),
    "kFloat4E2M1": (10, None),
}
BACKENDS = {
    "NVTE_No_Backend": -1,
    "NVTE_F16_arbitrary_seqlen": 1,
    "NVTE_FP8": 2,
}
FORWARD = {
    f"GEMM{gemm + 1}_{operand}": 3 * gemm + place
    for gemm in range(3)
    for place, operand in enumerate(("INPUT", "WEIGHT", "OUTPUT"))
}
BACKWARD = {
    f"{operand}{gemm + 1}": 2 * gemm + place
    for gemm in range(3)
    for place, operand in enumerate(("GRAD_OUTPUT", "GRAD_INPUT"))
}
"""Places of a layer's scales, in the order that `RecipeState` has for them too."""

CAPABILITY = [(9, 0)]
"""The device that is pretended: an H100."""


class _Member(int):
    name: str


def _enum(name: str, values: dict[str, int]) -> Any:
    """Like an enum of pybind11: `DType.kByte`, `__members__`, isinstance."""
    members: dict[str, Any] = {}
    cls = type(name, (_Member,), {"__members__": members})
    for member, value in values.items():
        members[member] = cls(value)
        setattr(cls, member, members[member])
    return cls


class _Nothing(type):
    """A class whose every attribute is 0, for enums and handles."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return 0


class _Anything:
    """Takes every call, attribute and index, as a decorator gives nothing but itself."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> Any:
        return self


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are imported at the top of modules no linear layer needs."""

    names = ("einops", "onnx", "onnxscript", "triton")

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.split(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> Any:
        package = _Package(spec.name)
        package.__version__ = "3.5.0"  # triton's, which is asked for
        return package

    def exec_module(self, module: Any) -> None:
        pass


class _Package(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Extension(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})


def _torch_dtype(value: Any) -> Any:
    return next(dtype for number, dtype in DTYPES.values() if number == int(value))


def quantize(tensor: Tensor, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    """Cast with the scale of the quantizer (delayed) or of the tensor (current), note the amax."""
    from transformer_engine.pytorch import Float8Quantizer

    dtype = _torch_dtype(quantizer.dtype)
    limit = torch.finfo(dtype).max
    values = tensor.detach().float()
    amax = values.abs().max()
    if isinstance(quantizer, Float8Quantizer):
        scale = quantizer.scale.clone()
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
    else:
        scale = (torch.full((), limit) / amax).reshape(1)
        if quantizer.force_pow_2_scales:
            _, exponent = torch.frexp(scale)
            scale = torch.ldexp(torch.ones_like(scale), exponent - 1)
    data = (values * scale).clamp(-limit, limit).to(dtype).view(torch.uint8)
    from transformer_engine.pytorch import Float8Tensor, Float8TensorStorage

    shape = {"shape": tensor.shape, "dtype": tensor.dtype}
    cls: Any = Float8Tensor
    if quantizer.internal:
        cls, shape = Float8TensorStorage, {}
    transpose = data.reshape(-1, data.shape[-1]).t().contiguous()
    return cls(
        **shape,
        data=data if quantizer.rowwise_usage else None,
        fp8_scale_inv=scale.reciprocal(),
        fp8_dtype=quantizer.dtype,
        quantizer=quantizer,
        data_transpose=transpose if quantizer.columnwise_usage else None,
        **({"fake_dtype": tensor.dtype} if quantizer.internal else {"device": tensor.device}),
    )


def wide(operand: Any, columnwise: bool) -> Tensor:
    """An operand as float32 [rows, columns], from the copy that the hardware would read."""
    if isinstance(operand, Tensor) and not hasattr(operand, "_scale_inv"):
        return operand.float().reshape(-1, operand.shape[-1])
    dtype = _torch_dtype(operand._fp8_dtype)
    if columnwise:
        assert operand._transpose is not None, "the columnwise copy is not there"
        return operand._transpose.view(dtype).float().t() * operand._scale_inv
    assert operand._data is not None, "the rowwise copy is not there"
    data = operand._data
    return data.reshape(-1, data.shape[-1]).view(dtype).float() * operand._scale_inv


def generic_gemm(
    a: Any,
    transa: bool,
    b: Any,
    transb: bool,
    out: Any,
    quantizer: Any,
    out_dtype: Any,
    bias: Any,
    bias_type: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    *_: Any,
    **__: Any,
) -> tuple[Any, Any, Any, Any]:
    """In cuBLAS's order of columns: op(b) @ op(a)."""
    left, right = wide(b, columnwise=transb), wide(a, columnwise=not transa)
    product = (left.t() if transb else left) @ (right.t() if transa else right)
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = wide(b, columnwise=transb).sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias
    product = product.to(_torch_dtype(out_dtype))
    if out is not None:
        out.copy_(product.reshape(out.shape))
        product = out
    return product, bias_gradient, None, None


def bgrad_quantize(tensor: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The gradient of a bias and the cast of grad_output, in one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows.sum(0), quantize(tensor, quantizer)


def install(package: Path) -> Any:
    """Import Transformer Engine from an unpacked wheel, over the stub.

    Args:
        package: the folder that holds `transformer_engine`.

    Returns:
        `transformer_engine.pytorch`.
    """
    os.environ.update(
        NVTE_PROJECT_BUILDING="1",  # do not look for shared libraries
        NVTE_UNFUSED_FP8_UPDATE="1",  # scales are updated in Python
        NVTE_TORCH_COMPILE="0",
    )
    sys.path.insert(0, str(package))
    extension = _Extension("transformer_engine_torch")
    for function in (quantize, generic_gemm, bgrad_quantize):
        setattr(extension, function.__name__, function)
    extension.__dict__["DType"] = _enum("DType", {n: value for n, (value, _) in DTYPES.items()})
    extension.__dict__["NVTE_Fused_Attn_Backend"] = _enum("NVTE_Fused_Attn_Backend", BACKENDS)
    extension.__dict__["FP8FwdTensors"] = _enum("FP8FwdTensors", FORWARD)
    extension.__dict__["FP8BwdTensors"] = _enum("FP8BwdTensors", BACKWARD)
    extension.__dict__["get_cublasLt_version"] = lambda: 130000
    sys.modules["transformer_engine_torch"] = extension
    absent = _Absent()
    sys.meta_path.append(absent)  # last: where they are installed, they are themselves

    # What asks for CUDA in Python.
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *_: CAPABILITY[0]
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.synchronize = lambda *_: None
    torch.version.cuda = "13.0"
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.Tensor.is_cuda = property(lambda self: True)  # pyright: ignore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformer_engine.common

        transformer_engine.common.load_framework_extension = lambda framework: None
        import transformer_engine.pytorch
        import transformer_engine.pytorch.quantization as quantization
        from transformer_engine.pytorch import utils
        from transformer_engine.pytorch.cpp_extensions import gemm

    sys.meta_path.remove(absent)
    for name in [name for name, module in sys.modules.items() if isinstance(module, _Package)]:
        del sys.modules[name]  # torch too would ask for them

    gemm.get_cublas_workspace = lambda *_: torch.empty(1)
    for module in (quantization, utils):
        module.get_device_compute_capability = lambda: CAPABILITY[0]
    made = quantization.RecipeState.create
    quantization.RecipeState.create = staticmethod(
        lambda *args, **kwargs: made(*args, **{"device": torch.device("cpu"), **kwargs})
    )
    return transformer_engine.pytorch
