"""What Lightning's ThroughputMonitor must know of a run's precision, and cannot read from ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import ThroughputMonitor

FP8_PEAK = torch.int8
"""Under this dtype Lightning keeps the FLOPs of FP8 tensor cores, for its own Transformer Engine
plugin too (`_plugin_to_compute_dtype`)."""

PEAK: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""By the base's format, where no layer is in FP8."""


def tell_throughput_monitors(trainer: Any, dtype: torch.dtype) -> None:
    """Give the monitors of a Trainer the FLOPs that its hardware has in a dtype.

    They take every plugin that is none of Lightning's for float32, so that a run in FP8 would seem
    to use several times what there is. To be called when their `setup` is over.

    Args:
        trainer: a Trainer; None does nothing.
        dtype: that in which the hardware is to show what it can.
    """
    if trainer is None:
        return
    for monitor in trainer.callbacks:
        if isinstance(monitor, ThroughputMonitor):
            device = trainer.strategy.root_device
            flops = get_available_flops(device, dtype)
            if flops is None and device.type == "cpu":  # unknown: what somebody has set stays
                continue
            monitor.available_flops = flops
            for throughput in monitor._throughputs.values():
                throughput.available_flops = flops
