"""What a run is, as it stands: options, layers, hardware and versions."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lightning as L
import torch

from lightning_fp.callbacks.run.run_settings import Settled, settings_by_class
from lightning_fp.layers import ConversionReport, PrecisionMap
from lightning_fp.records.run import LayerInfo, RunInfo

_PACKAGES = ("lightning-fp", "torch", "lightning", "torchao", "transformer-engine")


def run_info(trainer: L.Trainer, callbacks: Iterable[Settled]) -> RunInfo:
    """What to write down at each start of a run.

    Args:
        trainer: the Trainer, in `fit`.
        callbacks: ours.
    """
    plugin: Any = trainer.precision_plugin
    report: ConversionReport | None = getattr(plugin, "report", None)
    table = table_of(trainer)
    formats: dict[str, str] = {} if table is None else table.formats()
    device = trainer.strategy.root_device
    return RunInfo(
        step=trainer.global_step,
        settings=settings_by_class(plugin, callbacks),
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
        parameters=sum(p.numel() for p in trainer.lightning_module.parameters()),
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        world_size=trainer.world_size,
        strategy=type(trainer.strategy).__name__,
        versions={"python": platform.python_version(), **_versions()},
    )


def table_of(trainer: L.Trainer) -> PrecisionMap | None:
    """The table of formats; None under a plugin that is none of ours."""
    table = getattr(trainer.precision_plugin, "precision_map", None)
    return table if isinstance(table, PrecisionMap) else None


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
