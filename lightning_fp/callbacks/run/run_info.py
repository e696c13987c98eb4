"""What a run is, as it stands: options, layers, hardware and versions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L

from lightning_fp.callbacks.run.run_settings import Settled, settings_by_class
from lightning_fp.layers import PrecisionMap
from lightning_fp.records.run import RunInfo
from lightning_fp.telemetry.run_info import describe_run


def run_info(trainer: L.Trainer, callbacks: Iterable[Settled]) -> RunInfo:
    """What to write down at each start of a run.

    Args:
        trainer: the Trainer, in `fit`.
        callbacks: ours.
    """
    plugin: Any = trainer.precision_plugin
    return describe_run(
        step=trainer.global_step,
        settings=settings_by_class(plugin, callbacks),
        report=getattr(plugin, "report", None),
        table=table_of(trainer),
        model=trainer.lightning_module,
        device=trainer.strategy.root_device,
        strategy=type(trainer.strategy).__name__,
    )


def table_of(trainer: L.Trainer) -> PrecisionMap | None:
    """The table of formats; None under a plugin that is none of ours."""
    table = getattr(trainer.precision_plugin, "precision_map", None)
    return table if isinstance(table, PrecisionMap) else None
