"""Show what this machine has, and which formats run on it: in hardware, emulated or not at all."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.markup import escape
from torch import nn

from lightning_fp.cli.commands.fp16_scale import advice, load_loss, probe_scales
from lightning_fp.cli.output import console, print_json
from lightning_fp.format_names import TABLE
from lightning_fp.kernels.cards import CARDS
from lightning_fp.kernels.hardware import CPU_HAS_BF16, cuda_fp8_refusal
from lightning_fp.kernels.transformer_engine import availability
from lightning_fp.layers import LinearFormat, convert, linear_format
from lightning_fp.terminal import FittedTable

FORMATS = (*(row.name for row in TABLE if row.name != "high"), "e8m3")
"""The formats of the table; e8m3 stands for every simulated e{X}m{Y}."""

PACKAGES = ("torch", "lightning", "torchao", "torchmetrics", "transformer-engine")


_RIGHT = ("loss scale", "zero", "subnormal")


@dataclass(frozen=True, kw_only=True, slots=True)
class Support:
    """What becomes of one format here."""

    format: str
    status: Literal["native", "emulated", "not"]
    kernel: str
    reason: str


def run(*, fp16: str | None, json: bool) -> int:
    """Print hardware, versions and the table of formats; or how FP16 holds a model's gradients."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if fp16 is not None:
        return _advise_on_scale(fp16, device, json=json)
    facts = {"hardware": hardware(), "software": software()}
    formats = [support(name, device) for name in FORMATS]
    if json:
        rows = [dataclasses.asdict(row) for row in formats]
        cards = [dataclasses.asdict(each) for each in CARDS]
        print_json({**facts, "device": device, "formats": rows, "cards": cards})
        return 0

    screen = console()
    for title, section in facts.items():
        grid = FittedTable(title.capitalize(), "", "", bare=True)
        for key, value in section.items():
            grid.add_row(key, escape(value))
        screen.print(grid)
    grid = FittedTable(f"Formats on {device.upper()}", "format", "here", "kernel", "why")
    shown = {
        "native": "[green]in hardware[/]",
        "emulated": "[yellow]emulated[/]",
        "not": "[red]no[/]",
    }
    for row in formats:
        status = shown[row.status]
        grid.add_row(row.format, status, row.kernel, row.reason)
    screen.print(grid)
    grid = FittedTable("By card", "cards", "architecture", "fp8 by tensor or row", "by block")
    for each in CARDS:
        grid.add_row(each.names, each.architecture, escape(each.fp8), escape(each.blocks))
    screen.print(grid)
    screen.print(
        "Emulated FP8: values are cast to FP8 and multiplied in bf16 or float32.", style="dim"
    )
    return 0


def _advise_on_scale(reference: str, device: str, *, json: bool) -> int:
    """Print what becomes of one batch's gradients at each loss scale."""
    probes = probe_scales(*load_loss(reference, device))
    if json:
        rows = [dataclasses.asdict(probe) for probe in probes]
        print_json({"scales": rows, "advice": advice(probes)})
        return 0
    grid = FittedTable(
        "Gradients in FP16", "loss scale", "zero", "subnormal", "overflows first in", right=_RIGHT
    )
    for probe in probes:
        shares = (f"{probe.zero:.2%}", f"{probe.subnormal:.2%}")
        grid.add_row(f"{probe.scale:g}", *shares, probe.overflow or "")
    console().print(grid)
    console().print(advice(probes))
    return 0


def hardware() -> dict[str, str]:
    """What multiplies here."""
    facts = {
        "machine": f"{platform.system()} {platform.machine()}",
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "CPU bf16": "in hardware" if CPU_HAS_BF16 else "in software: slower than float32",
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        facts[f"CUDA {index}"] = f"{device.name}, sm{device.major}{device.minor}, {memory:.0f} GiB"
    facts["FP8 tensor cores"] = cuda_fp8_refusal() or "yes"
    if torch.backends.mps.is_available():
        facts["MPS"] = "no float8 dtypes: FP8 is emulated in float32, rounded by integers"
    return facts


def software() -> dict[str, str]:
    """Versions, and whether torch.compile finds a compiler."""
    facts = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["backend='transformer-engine'"] = _transformer_engine()
    facts["C++ compiler"] = _compiler() or "none found: torch.compile cannot compile for the CPU"
    return facts


def support(name: str, device: str) -> Support:
    """Convert one small layer, train it for a step, and say what happened.

    Args:
        name: a format's name.
        device: "cpu" or "cuda".
    """
    model = nn.Sequential(nn.Linear(64, 64, device=device))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            format = linear_format(name)
            # As a rule, because the defaults leave layers this small alone on FP8 hardware.
            table_of_formats = convert(model, format, layers={"*": format}).precision_map
            kernel = table_of_formats.layers["0"].kernel
            model(torch.ones(64, 64, device=device)).sum().backward()
    except Exception as error:  # whatever a kernel raises is the answer
        return Support(format=name, status="not", kernel="", reason=_reason(error, name))
    if kernel.runs_on_fp8_hardware and device == "cuda":
        return Support(format=name, status="native", kernel=kernel.name, reason="FP8 tensor cores")
    lacking = _lacking(format, device)
    status = "emulated" if lacking else "native"
    return Support(format=name, status=status, kernel=kernel.name, reason=lacking or "")


def _lacking(format: LinearFormat, device: str) -> str | None:
    """What the device would need to run a format natively; None if it has it."""
    if format.is_fp8:
        return cuda_fp8_refusal()
    if not format.is_high_precision:
        return "operands are rounded, products summed in float32"
    if format.input == "bf16":
        has = torch.cuda.is_bf16_supported(False) if device == "cuda" else CPU_HAS_BF16
        return None if has else "no bf16 instructions: slower than float32"
    if format.input == "fp16" and device == "cpu":
        return None if _cpu_has_fp16() else "no fp16 instructions: slower than float32"
    return None


def _cpu_has_fp16() -> bool:
    """Whether the CPU multiplies fp16 in hardware; False where torch cannot tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_fp16", "amx_fp16", "fp16"))


def _transformer_engine() -> str:
    """The formats it runs here, and why not the others."""
    reasons = availability()
    there = [format for format, reason in reasons.items() if reason is None]
    why = dict.fromkeys(reason for reason in reasons.values() if reason is not None)
    runs = [f"runs {', '.join(there)}"] if there else []
    return "; ".join([*runs, *why])


def _compiler() -> str | None:
    """The C++ compiler that torch.compile would call."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return None


def _reason(error: Exception, name: str) -> str:
    """The first line of an error, less what the table says anyway."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].removeprefix(f"format {name!r} cannot be used: ")
