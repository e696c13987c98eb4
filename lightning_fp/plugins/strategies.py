"""Strategies that a precision plugin cannot work under."""

from __future__ import annotations

from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy

_REFUSED: dict[type[Strategy], str] = {
    DeepSpeedStrategy: (
        "DeepSpeed owns precision itself; use ModelParallelStrategy (FSDP2) or DDPStrategy"
    ),
    XLAStrategy: "XLA devices have no FP8 kernels here; use a CUDA or CPU strategy",
    SingleDeviceXLAStrategy: "XLA devices have no FP8 kernels here; use a CUDA or CPU strategy",
}


def refuse_strategy(strategy: Strategy, plugin: str) -> None:
    """Refuse strategies under which the plugin's formats would silently not be used.

    Raises:
        ValueError: naming the strategy and the alternative.
    """
    for refused, why in _REFUSED.items():
        if isinstance(strategy, refused):
            raise ValueError(f"strategy must not be {type(strategy).__name__} with {plugin}: {why}")
