"""What a run is, as it stands: options, layers, hardware and versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_fp.layers import ConversionReport, PrecisionMap
from lightning_fp.rank_group import ranks
from lightning_fp.records.run import LayerInfo, RunInfo

_WRAPPERS = ("DistributedDataParallel", "OptimizedModule", "_FabricModule")
_PACKAGES = ("lightning-fp", "torch", "lightning", "torchao", "transformer-engine")


def describe_run(
    *,
    step: int,
    settings: Mapping[str, Mapping[str, Any]],
    report: ConversionReport | None,
    table: PrecisionMap | None,
    model: nn.Module,
    device: torch.device,
    strategy: str,
) -> RunInfo:
    """What to write down at each start of a run.

    Args:
        step: optimizer steps done.
        settings: options by class, as plain data.
        report: what the conversion did, where there was one.
        table: the formats of now.
        model: the model.
        device: where it is.
        strategy: how ranks work together, in a word.
    """
    formats: dict[str, str] = {} if table is None else table.formats()
    return RunInfo(
        step=step,
        model=_class_of(model),
        settings=settings,
        layers=tuple(
            LayerInfo(
                name=row.name,
                format=formats.get(row.name, row.format),
                kernel=row.kernel,
                flops_share=row.flops_share,
                reason=row.reason,
            )
            for row in ([] if report is None else report.layers)
        ),
        parameters=sum(p.numel() for p in model.parameters()),
        device=_name_of(device),
        world_size=ranks(),
        strategy=strategy,
        versions={"python": platform.python_version(), **_versions()},
    )


def _class_of(model: nn.Module) -> str:
    """Its class, beneath what DDP, Fabric and torch.compile put around it."""
    for name in ("module", "_orig_mod", "_forward_module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and type(model).__name__ in _WRAPPERS:
            return _class_of(inner)
    return type(model).__name__


@cache
def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type.upper()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    return name if "CPU" in name else f"{name} CPU"


@cache
def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
