"""LossScaler: applies a loss scale to the losses and gradients of a Trainer's optimizers."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.stability.loss_scaling import (
    STATE_VERSION,
    LossScaleError,
    LossScaling,
    LossScalingState,
)
from lightning_fp.stepping.gradients import gradients_of


class NoScaler:
    """Losses as they are: a `LossScaler` where none is needed."""

    must_skip = False
    """Whether steps with inf or NaN gradients are left out in any case."""

    def scale(self) -> float:
        """By what losses are multiplied now; waits for the device."""
        return 1.0

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call backward on, which has to follow."""
        return loss

    def unscale(self, optimizer: Optimizer) -> None:
        """Take the scale out of an optimizer's gradients, if it is in them."""

    def update(self, finite: Tensor) -> None:
        """Hear whether a step's gradients were finite: bool scalar on any device."""

    held = False
    """Whether somebody has asked to hold the scale."""

    def hold(self, largest: float) -> None:
        """The scale of the next backward is at most this, if it is one that moves."""

    @property
    def moves(self) -> bool:
        """Whether there is a scale that moves."""
        return False

    def settle(self) -> None:
        """The scale moves. Call it where no loss of the same step is still to be scaled."""

    def check(self) -> None:
        """After a step was left out: end the run if that is what it has been asked for."""

    def untouched(self) -> AbstractContextManager[None]:
        """Leave no trace of what is scaled in the block."""
        return nullcontext()


class LossScaler(NoScaler):
    """Scales losses before backward, and takes the scale out of gradients, once for each step.

    Between backward passes every gradient is in one of two states: with the scale, or without, if
    its optimizer has been asked for (`unscale`) since the last backward. What is accumulated on is
    brought to the scale of now first, so several optimizers may clip, accumulate and step in any
    order. The host never waits for the device here.

    Args:
        config: how the scale moves.
    """

    must_skip = True

    def __init__(self, config: LossScaling) -> None:
        self.config = config
        self.active = True
        """Whether anything is scaled: not while the run is in another dtype than FP16."""
        self.optimizers: Sequence[Optimizer] = ()
        """All of the run."""
        self._state = config.init()
        self._unscaled: set[Optimizer] = set()
        self._found_inf: Tensor | None = None
        self._backward = False

    @property
    def state(self) -> LossScalingState:
        """Where the scale stands, on its device."""
        return self._state

    @override
    def scale(self) -> float:
        return float(self._state.scale) if self.active else 1.0

    @override
    def scaled(self, loss: Tensor) -> Tensor:
        """In float32: FP16 does not hold a scale of 2**16.

        Gradients that this backward may add to get the scale back.
        """
        if not self.active:
            return loss
        for optimizer in self._unscaled:
            _multiply(gradients_of(optimizer), self._state.scale)
        self._unscaled.clear()
        self._backward = True
        if self._state.scale.device != loss.device:
            self._state = self._state.to(loss.device)
        return loss.float() * self._state.scale

    @override
    def unscale(self, optimizer: Optimizer) -> None:
        if not self.active or optimizer in self._unscaled:
            return
        self._unscaled.add(optimizer)
        _multiply(gradients_of(optimizer), self._inverse)

    def unscale_all(self, parameters: Iterable[Tensor]) -> None:
        """Take the scale out of all gradients: the optimizers', and those of no optimizer."""
        if not self.active:
            return
        for optimizer in self.optimizers:
            self.unscale(optimizer)
        known = {
            id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]
        }
        others = [p.grad for p in parameters if id(p) not in known and p.grad is not None]
        _multiply(others, self._inverse)

    @property
    def _inverse(self) -> Tensor:
        return self._state.scale.double().reciprocal().float()

    @override
    def update(self, finite: Tensor) -> None:
        if self.active and self._backward:
            bad = ~finite.to(self._state.scale.device)
            self._found_inf = bad if self._found_inf is None else self._found_inf | bad

    @override
    def hold(self, largest: float) -> None:
        self.held = True
        if self.moves:
            largest = max(largest, self.config.min_scale)
            self._move_to(replace(self._state, scale=self._state.scale.clamp(max=largest)))

    @property
    @override
    def moves(self) -> bool:
        return self.active and self.config.growth_interval is not None

    @override
    def settle(self) -> None:
        """The scale moves. Call it where no loss of the same step is still to be scaled.

        Where several optimizers step one after the other, an overflow of any makes it fall, once.
        """
        if self._found_inf is None:
            return
        state = self.config.update(self._state, self._found_inf)
        self._found_inf, self._backward = None, False
        self._move_to(state)

    def _move_to(self, state: LossScalingState) -> None:
        factor = state.scale / self._state.scale
        self._state = state
        for optimizer in self.optimizers:
            if optimizer not in self._unscaled:  # it accumulates on
                _multiply(gradients_of(optimizer), factor)

    @override
    def check(self) -> None:
        """After a step was left out: end the run if that is what it has been asked for.

        Raises:
            LossScaleError: if the scale cannot fall any further.
        """
        if self.active and self.config.on_min_scale == "raise" and int(self._state.stuck):
            raise LossScaleError(
                f"gradients overflow at the least loss scale, {float(self._state.scale):g}: FP16"
                " does not hold them; train in bf16, or use on_min_scale='fallback' with"
                " PrecisionFallback, which turns the run to bf16 by itself"
            )

    def restart(self) -> None:
        """FP16 begins anew, as after a time in bf16; counts go on."""
        begin = self.config.init(self._state.scale.device)
        self._state = LossScalingState(
            scale=begin.scale,
            clean=begin.clean,
            patience=begin.patience,
            stuck=begin.stuck,
            made=self._state.made,
            skipped=self._state.skipped,
        )

    @override
    @contextmanager
    def untouched(self) -> Generator[None, None, None]:
        before = dict(vars(self))
        self._unscaled, self._found_inf = set(), None
        try:
            yield
        finally:
            vars(self).update(before)

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return self.config.state_dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`; a `torch.amp.GradScaler`'s will do as well."""
        self._state = self.config.load_state_dict(state, self._state.scale.device)
        self._found_inf = None

    def grad_scaler_state(self) -> dict[str, Any]:
        """As a `torch.amp.GradScaler` saves it."""
        return self.config.grad_scaler_state(self._state)


class LossScalePart:
    """A loss scale in snapshots: as tensors, copied without waiting for the device."""

    def __init__(self, scaler: LossScaler) -> None:
        self._scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self._scaler.state))

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        numbers = LossScalingState(**state_dict).numbers()
        self._scaler.load_state_dict({"version": STATE_VERSION, **numbers})


@torch.no_grad()
def _multiply(gradients: Iterable[Tensor], factor: Tensor) -> None:
    """In place, all at once; of sparse ones the values, of sharded ones this rank's shard."""
    by_device: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        local: Any = gradient
        if hasattr(local, "to_local"):
            local = local.to_local()
        local = local._values() if local.is_sparse else local
        by_device.setdefault((local.device, local.dtype), []).append(local)
    for (device, _), tensors in by_device.items():
        torch._foreach_mul_(tensors, factor.to(device))  # pyright: ignore[reportPrivateImportUsage]
