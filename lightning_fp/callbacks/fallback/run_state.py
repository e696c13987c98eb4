"""The state of a run that a rollback takes back: weights, optimizers, averages, scales."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_fp.plugins.guard import hyperparameters
from lightning_fp.plugins.loss_scaler import LossScaler
from lightning_fp.stability.keep.snapshot import Part, Snapshot, restore, stated_bytes, take
from lightning_fp.stability.loss_scaling import STATE_VERSION, LossScalingState

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
        self._weights: dict[str, Part] = {"model": module}
        for index, optimizer in enumerate(trainer.optimizers):
            self._weights[f"optimizer {index}"] = optimizer
        callbacks: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
        for index, callback in enumerate(callbacks):
            for name, value in vars(callback).items():
                # averages of the weights, such as WeightAveraging's, are outside of the module
                if isinstance(value, nn.Module) and value is not module:
                    self._weights[f"callback {index} {name}"] = value
        plugin: Any = trainer.precision_plugin
        self._scales: dict[str, Part] = {SCALES: plugin.precision_map.scale_history}
        if plugin.scaler is not None:
            self._scales[LOSS_SCALE] = _LossScale(plugin.scaler)
        sharded = any(isinstance(m, FSDPModule) for m in module.modules())
        self.single = trainer.world_size == 1 and not sharded
        """Whether this process has all of the state."""

    def parts(self) -> dict[str, Part]:
        """What a snapshot is of."""
        return {**self._weights, **self._scales}

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
        return take(self._weights, step=self._trainer.global_step)

    def restore_weights(self, snapshot: Snapshot) -> None:
        """Weights, optimizers and averages of a snapshot, with the learning rates of now."""
        now = [hyperparameters(optimizer) for optimizer in self._trainer.optimizers]
        restore(snapshot, self._weights)
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


def set_hyperparameters(optimizer: Any, groups: list[dict[str, Any]]) -> None:
    """Give each parameter group the plain numbers it had, see `guard.hyperparameters`."""
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        for name, value in values.items():
            if isinstance(group[name], Tensor):
                group[name].fill_(value)
            else:
                group[name] = value
