"""StepGuard: looks at the gradients before an optimizer's step, and skips it where it must."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lightning_fp.stability.keep.hyperparameters import hyperparameters, set_hyperparameters
from lightning_fp.stepping.gradients import (
    calls_closure_itself,
    gradient_norm,
    gradients_of,
    whole_norm,
)
from lightning_fp.stepping.late_flags import LateFlags
from lightning_fp.stepping.loss_scaler import NoScaler
from lightning_fp.stepping.overflows import first_overflow
from lightning_fp.telemetry import OptimizerStep

log = logging.getLogger(__name__)

NEVER = 2**62
"""Frequency of a scheduler that waits: larger than any count of batches."""

MOST_NAMED = 128
"""Steps left out of which the guard remembers the layer."""


class StepGuard:
    """Runs the closure, looks at the gradients, and steps or skips.

    A fused optimizer on CUDA takes the finding as a device flag, and the host hears of it a step
    later; for others one scalar is waited for. An optimizer that has to call its closure itself,
    such as LBFGS, steps unguarded.

    Args:
        skip_nonfinite: whether a step with an inf or NaN gradient is left out.
        scaler: scales the loss, if anything does.
        hold_schedulers: whether learning rate schedulers wait where a step is left out.
    """

    def __init__(
        self,
        *,
        skip_nonfinite: bool = True,
        scaler: NoScaler | None = None,
        hold_schedulers: bool = True,
    ) -> None:
        self.skip_nonfinite = skip_nonfinite
        self.scaler = scaler or NoScaler()
        self.keeps_record = True
        """Whether somebody takes `steps` out."""
        self.steps: list[OptimizerStep] = []
        """The steps since somebody took them out, one for each optimizer that stepped."""
        self.overflowed: dict[int, str] = {}
        """By the `global_step` of steps left out last, the layer that overflowed first."""
        self.replaying = False
        """Whether steps belong to a replay: they are guarded, and neither kept nor held."""
        self.replay_skipped = False
        """Whether a step of a replay was left out, since somebody set this to False."""
        self.replay_hyperparameters: list[dict[str, Any]] | None = None
        """What a replay's optimizer steps with, if that is known."""
        self._norm: Tensor | None = None
        self._hold = SchedulerHold(on=hold_schedulers)
        self._late = LateFlags()
        self._warned = False

    def step(
        self,
        plugin: Precision,
        optimizer: Optimizer,
        model: LightningModule,
        closure: Callable[[], Any],
        **kwargs: Any,
    ) -> Any:
        """One optimizer's step.

        Args:
            plugin: clips the gradients.
            optimizer: what steps.
            model: whose hooks are called between backward and step.
            closure: runs forward and backward; does nothing in manual optimization.
            kwargs: go to the optimizer.

        Returns:
            What the optimizer returned; what the closure returned if the step was skipped.
        """
        if self.replay_hyperparameters is not None:
            set_hyperparameters(optimizer, self.replay_hyperparameters)
        if calls_closure_itself(optimizer):
            self._warn(optimizer)
            unguarded: Any = Precision.optimizer_step
            return unguarded(plugin, optimizer, model, closure, **kwargs)
        groups = hyperparameters(optimizer)
        if closure is not do_nothing_closure and not _calls_closure_once(optimizer):
            output, norm, skip = self._inside(plugin, optimizer, model, closure, kwargs)
            finite = torch.isfinite(norm)
            if self.skip_nonfinite:  # any pass may have been it, and the norm is the last one's
                finite = torch.full_like(finite, not skip)
        else:
            result = closure()
            norm, finite = self._look(plugin, optimizer, model)
            if self._takes_flag(optimizer, norm):
                output, skip = self._fused(optimizer, finite, result, kwargs), False
            else:
                skip = self.skip_nonfinite and not bool(finite)
                output = result if skip else optimizer.step(closure=lambda: result, **kwargs)
        if self.replaying:
            self.replay_skipped |= self.skip_nonfinite and not bool(finite)
            return output
        late = self._late.take()  # the step before this one, if a kernel left it out
        if skip or late:
            self._hold.hold(model.trainer)
        if skip:
            self._name_overflow(model.trainer, model.trainer.global_step)
        # Made on the device: a copy from the host would wait for it.
        skipped = ~finite if self.skip_nonfinite else torch.zeros_like(finite)
        if self.keeps_record:
            seen = OptimizerStep(grad_norm=norm, skipped=skipped, hyperparameters=groups)
            self.steps.append(seen)
        self.scaler.update(finite)
        if model.automatic_optimization:
            self.scaler.settle()
        if skip or late:
            self.scaler.check()
        return output

    def _look(
        self, plugin: Precision, optimizer: Optimizer, model: LightningModule
    ) -> tuple[Tensor, Tensor]:
        """What follows a backward: unscale, clip, and see whether the gradients are finite."""
        self.scaler.unscale(optimizer)
        norm = self._around_clipping(plugin, optimizer, model)
        return norm, torch.isfinite(norm)

    def _inside(
        self,
        plugin: Precision,
        optimizer: Optimizer,
        model: LightningModule,
        closure: Callable[[], Any],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Tensor, bool]:
        """The optimizer runs the closure when and as often as it likes, as without a guard.

        Sharpness-aware optimizers do so twice, at different weights. Gradients that are not finite
        end the step at its first pass. Later the optimizer must put its weights back, so it goes
        on, with gradients of zero.

        Returns:
            The optimizer's output, the norm of the last pass, whether the step was left out.
        """
        norms: list[Tensor] = []
        skipped = False

        def guarded() -> Any:
            nonlocal skipped
            result = closure()
            norm, finite = self._look(plugin, optimizer, model)
            norms.append(norm)
            if self.skip_nonfinite and not bool(finite):
                skipped = True
                if len(norms) == 1:
                    raise _LeftOutError(result)
                for gradient in gradients_of(optimizer):
                    gradient.zero_()
            return result

        try:
            output = optimizer.step(closure=guarded, **kwargs)
        except _LeftOutError as left_out:
            output = left_out.args[0]
        return output, norms[-1] if norms else torch.zeros(()), skipped

    def _name_overflow(self, trainer: Trainer, step: int) -> None:
        """Gradients stay until the next backward, so a step that a kernel skipped has them too."""
        layer = first_overflow(trainer.lightning_module)
        if layer is not None:
            self.overflowed[step] = layer
        while len(self.overflowed) > MOST_NAMED:
            del self.overflowed[next(iter(self.overflowed))]

    @staticmethod
    def _takes_flag(optimizer: Optimizer, norm: Tensor) -> bool:
        """Whether the optimizer's own kernel can leave the step out, unseen by the host."""
        return norm.is_cuda and getattr(optimizer, "_step_supports_amp_scaling", False)

    def _fused(self, optimizer: Any, finite: Tensor, result: Any, kwargs: dict[str, Any]) -> Any:
        """The optimizer's own kernel leaves the step out; the host hears of it a step later."""
        if self.skip_nonfinite:
            optimizer.found_inf = (~finite).float()
        try:
            return optimizer.step(closure=lambda: result, **kwargs)
        finally:
            if self.skip_nonfinite:
                del optimizer.found_inf
                if not self.replaying:
                    self._late.put(~finite)

    def _around_clipping(
        self, plugin: Precision, optimizer: Optimizer, model: LightningModule
    ) -> Tensor:
        """The norm before clipping; clipping by norm computes it anyway, see `clipped`."""
        self._norm = None
        if is_overridden("configure_gradient_clipping", model):
            self._norm = gradient_norm(optimizer)
        plugin._after_closure(model, optimizer)  # pyright: ignore[reportArgumentType]
        return gradient_norm(optimizer) if self._norm is None else self._norm

    def clipped(self, norm: Tensor) -> None:
        """Hear the norm that clipping has computed."""
        if self._norm is None:
            self._norm = whole_norm(norm)

    # -- schedulers -----------------------------------------------------------------------------

    def begin(self, trainer: Trainer) -> None:
        """At the begin of a batch: schedulers go on."""
        self._hold.release(trainer)
        self._late.next_batch()
        # Its gradients are still there. To name the layer is not worth waiting for the device, and
        # several ranks would have to do it together.
        if trainer.world_size == 1 and self._late.already():
            self._name_overflow(trainer, trainer.global_step - 1)

    def end_training_step(self, trainer: Trainer) -> None:
        """In manual optimization schedulers wait, and the loss scale stays, to the step's end."""
        if not trainer.lightning_module.automatic_optimization:
            self._hold.release(None)
            self.scaler.settle()

    def _warn(self, optimizer: Optimizer) -> None:
        if not self._warned:
            log.warning(
                "%s calls its closure itself and steps unguarded: steps with inf or NaN gradients"
                " are not skipped",
                type(optimizer).__name__,
            )
        self._warned = True


class SchedulerHold:
    """Lets the schedulers that step with the optimizer wait for one step, exactly.

    Args:
        on: whether it does.
    """

    def __init__(self, *, on: bool = True) -> None:
        self._on = on
        self._undo: list[Callable[[], object]] = []
        self._step = -1

    def hold(self, trainer: Trainer) -> None:
        """From now until `release`."""
        if self._undo or not self._on:
            return
        self._step = trainer.global_step
        automatic = trainer.lightning_module.automatic_optimization
        for config in trainer.lr_scheduler_configs:
            if not automatic:
                self._undo.append(_silence(config.scheduler))
            elif config.interval == "step":
                # A scheduler's own `step` would leak into its state_dict if replaced over a save.
                before, config.frequency = config.frequency, NEVER
                self._undo.append(lambda config=config, f=before: setattr(config, "frequency", f))

    def release(self, trainer: Trainer | None) -> None:
        """Let them go on, though not before the step is over that they wait for.

        Args:
            trainer: at the begin of a micro-batch, or of a replay; None ends it in any case.
        """
        if trainer is not None and trainer.global_step == self._step:
            return
        for undo in self._undo:
            undo()
        self._undo.clear()


def _silence(scheduler: Any) -> Callable[[], object]:
    """Replace `step` by nothing; returns what takes that back."""
    own = vars(scheduler)
    before = own.get("step")
    own["step"] = lambda *_, **__: None
    return (lambda: own.pop("step", None)) if before is None else (lambda: own.update(step=before))


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer inside of what Lightning hands out in manual optimization."""
    return getattr(optimizer, "optimizer", optimizer)


def _calls_closure_once(optimizer: Optimizer) -> bool:
    """Whether an optimizer is known to call its closure once, before all else: torch's own are."""
    return (getattr(type(optimizer).step, "__module__", None) or "").startswith("torch.optim.")


class _LeftOutError(Exception):
    """Leaves an optimizer's step from inside of its closure; carries the closure's result."""
