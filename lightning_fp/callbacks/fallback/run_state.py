"""The state of a run that a rollback takes back: weights, optimizers, averages, scales.

What counts the run's progress stays: `global_step`, schedulers, the loaders' position, the random
state. The run goes on with the batches that come next, and so with the learning rates of now.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_fp.callbacks.compare.loop_replay import hearing_callbacks
from lightning_fp.layers import FPLinear
from lightning_fp.stability.keep.attributes import Attributes
from lightning_fp.stability.keep.hyperparameters import hyperparameters, set_hyperparameters
from lightning_fp.stability.keep.snapshot import Part, Snapshot, restore, stated_bytes, take
from lightning_fp.stability.loss_scaling import STATE_VERSION, LossScalingState
from lightning_fp.stepping.loss_scaler import LossScaler

ATTRIBUTES = "attributes"
SCALES = "scales"
LOSS_SCALE = "loss scale"


class RunState:
    """What of a Trainer's run goes into snapshots, and how it comes back.

    `global_step`, schedulers, the data and the random state do not go back; learning rates stay
    those of now.

    Args:
        trainer: the Trainer, in `fit`.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = trainer
        module = trainer.lightning_module
        # now, since in a replay the Trainer has another list
        self._callbacks: list[Any] = list(trainer.callbacks)  # pyright: ignore
        self._hearing = hearing_callbacks(trainer)
        plugin: Any = trainer.precision_plugin
        self._scales: dict[str, Part] = {SCALES: plugin.precision_map.scale_history}
        if plugin.scaler is not None:
            self._scales[LOSS_SCALE] = _LossScale(plugin.scaler)
        sharded = any(isinstance(m, FSDPModule) for m in module.modules())
        self.single = trainer.world_size == 1 and not sharded
        """Whether this process has all of the state."""

    def _weights(self) -> dict[str, Part]:
        """What an optimizer step and the hooks around it change."""
        trainer, module = self._trainer, self._trainer.lightning_module
        parts: dict[str, Part] = {"model": module}
        for index, optimizer in enumerate(trainer.optimizers):
            parts[f"optimizer {index}"] = optimizer
        for index, callback in enumerate(self._callbacks):
            for name, value in vars(callback).items():
                # averages of the weights, such as WeightAveraging's, are outside of the module
                if isinstance(value, nn.Module) and value is not module:
                    parts[f"callback {index} {name}"] = value
        parts[ATTRIBUTES] = self._attributes()
        return parts

    def _attributes(self) -> Attributes:
        """Of the module, the user's callbacks and the optimizers; layers' belong to the table."""
        trainer = self._trainer
        owners: dict[str, object] = {
            f"module {name}": module
            for name, module in trainer.lightning_module.named_modules()
            if not isinstance(module, FPLinear)
        }
        for index, callback in enumerate(self._hearing):
            owners[f"callback {index}"] = callback
        for index, optimizer in enumerate(trainer.optimizers):
            owners[f"optimizer {index}"] = optimizer
        return Attributes(owners)

    def parts(self) -> dict[str, Part]:
        """What a snapshot is of."""
        return {**self._weights(), **self._scales}

    def stated_bytes(self) -> int:
        """What one snapshot takes once the optimizers have stepped."""
        return stated_bytes(self.parts(), stepped=True)

    def high_precision_bytes_per_token(self) -> int:
        """What backward keeps more of each token with all layers in high precision."""
        plugin: Any = self._trainer.precision_plugin
        low = [x for x in plugin.precision_map.layers.values() if not x.format.is_high_precision]
        # Of its input a layer in FP8 keeps one byte per element.
        width = 4 if plugin.precision == "32-true" else 2
        return sum(layer.in_features for layer in low) * (width - 1)

    def take(self) -> Snapshot:
        """A snapshot of the state now, less the scales."""
        return take(self._weights(), step=self._trainer.global_step)

    def restore_weights(self, snapshot: Snapshot) -> None:
        """Weights, optimizers, averages and plain attributes, with the learning rates of now."""
        self._restore(snapshot, self._weights())

    def go_back(self, snapshot: Snapshot) -> None:
        """The run goes on from a snapshot: what counts steps stays as it is."""
        parts = self._weights()
        attributes = self._attributes()
        attributes.numbers = False
        self._restore(snapshot, {**parts, ATTRIBUTES: attributes})

    def _restore(self, snapshot: Snapshot, parts: dict[str, Part]) -> None:
        now = [hyperparameters(optimizer) for optimizer in self._trainer.optimizers]
        there = [name for name in parts if name in snapshot.trees]  # averages may have come later
        restore(snapshot, parts, only=there)
        for optimizer, groups in zip(self._trainer.optimizers, now, strict=True):
            set_hyperparameters(optimizer, groups)

    def restore_scales(self, snapshot: Snapshot) -> None:
        """The loss scale of a snapshot, and amax histories for the layers that have one now."""
        restore(snapshot, self._scales)


class _LossScale:
    """A loss scale's state as tensors, which are copied without waiting for the device."""

    def __init__(self, scaler: LossScaler) -> None:
        self._scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self._scaler.state))

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        numbers = LossScalingState(**state_dict).numbers()
        self._scaler.load_state_dict({"version": STATE_VERSION, **numbers})
