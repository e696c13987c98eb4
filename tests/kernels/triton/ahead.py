"""The fused casts, compiled for cards that are not here, and what the assembler says of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_fp.kernels.triton import cast
from lightning_fp.kernels.triton.fused import constants
from lightning_fp.numerics import FORMATS

CAPABILITIES = (80, 89, 90, 100)
"""Ampere, Ada, Hopper, Blackwell."""

POINTERS = {"scale_ptr": "*fp32", "rows_ptr": "*u8", "columns_ptr": "*u8", "counters_ptr": "*i32"}
VARIANTS: dict[str, dict[str, bool]] = {
    "dynamic": {"FROM_AMAX": True, "FIND_AMAX": False, "COUNT": False},
    "delayed": {"FROM_AMAX": False, "FIND_AMAX": True, "COUNT": False},
    "sampled": {"FROM_AMAX": False, "FIND_AMAX": True, "COUNT": True},
}


def compiled(capability: int, variant: str, dtype: str, format: str) -> Any:
    """One kernel for one architecture, as Triton's compiler makes it."""
    target = GPUTarget("cuda", capability, 32)
    if variant == "amax":
        fixed: dict[str, Any] = {"BLOCK": cast.BLOCK, "LOOPS": cast.LOOPS}
        types = {"x_ptr": f"*{dtype}", "counters_ptr": "*i32", "size": "i32"}
        return _compile(cast.amax_kernel, types, fixed, target)
    fixed = {
        **constants(FORMATS[format]),
        **VARIANTS[variant],
        "WRITE_ROWS": True,
        "WRITE_COLUMNS": True,
        "HEIGHT": cast.HEIGHT,
        "WIDTH": cast.WIDTH,
    }
    sizes = dict.fromkeys(("height", "width", "stride", "padded"), "i32")
    types = {"x_ptr": f"*{dtype}", **POINTERS, **sizes}
    return _compile(cast.cast_kernel, types, fixed, target, warps=cast.WARPS)


def resources(kernel: Any) -> dict[str, int]:
    """Registers of a thread, bytes that spill into local memory, bytes of shared memory."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", str(cubin)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
    }


def _compile(
    function: Any, types: dict[str, str], fixed: dict[str, Any], target: Any, warps: int = 4
) -> Any:
    source = ASTSource(function, {**types, **dict.fromkeys(fixed, "constexpr")}, constexprs=fixed)
    options = {"num_warps": warps, "enable_fp_fusion": cast.FP_FUSION}
    return triton.compile(source, target=target, options=options)
