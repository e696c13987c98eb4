"""What of a Trainer's run goes into snapshots."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_fp.callbacks.compare.loop_replay import hearing_callbacks
from lightning_fp.layers import is_switchable
from lightning_fp.plugins import LayerPrecision
from lightning_fp.stability.keep.snapshot import Part
from lightning_fp.stability.supervise.run_state import LOSS_SCALE, SCALES, RunState
from lightning_fp.stepping.loss_scaler import LossScalePart


def state_of(trainer: L.Trainer, plugin: LayerPrecision) -> RunState:
    """The module, what callbacks average, the optimizers; attributes of these; the scales.

    Args:
        trainer: the Trainer, in `fit`.
        plugin: its precision plugin.
    """
    module = trainer.lightning_module
    # now, since in a replay the Trainer has another list
    callbacks: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    hearing = hearing_callbacks(trainer)

    def weights() -> dict[str, Part]:
        averages: dict[str, Part] = {
            f"callback {index} {name}": value
            for index, callback in enumerate(callbacks)
            for name, value in vars(callback).items()
            # averages of the weights, such as WeightAveraging's, are outside of the module
            if isinstance(value, nn.Module) and value is not module
        }
        return {"model": module, **averages}

    def owners() -> dict[str, object]:
        """The module, the user's callbacks, the optimizers; what is of layers is the table's."""
        modules: dict[str, object] = {
            f"module {name}": each
            for name, each in module.named_modules()
            if not is_switchable(each)
        }
        heard = {f"callback {index}": each for index, each in enumerate(hearing)}
        steppers = {f"optimizer {index}": each for index, each in enumerate(trainer.optimizers)}
        return {**modules, **heard, **steppers}

    scales: dict[str, Part] = {SCALES: plugin.precision_map.scale_history}
    if plugin.scaler is not None:
        scales[LOSS_SCALE] = LossScalePart(plugin.scaler)
    sharded = any(isinstance(each, FSDPModule) for each in module.modules())
    return RunState(
        weights=weights,
        optimizers=lambda: trainer.optimizers,
        owners=owners,
        scales=scales,
        single=trainer.world_size == 1 and not sharded,
    )
