"""StepGuard: the guard before the steps of a Trainer's optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lightning_fp.stepping.gradients import calls_closure_once, gradient_norm
from lightning_fp.stepping.guard import Guard
from lightning_fp.stepping.loss_scaler import NoScaler

NEVER = 2**62
"""Frequency of a scheduler that waits: larger than any count of batches."""


class StepGuard(Guard):
    """A `Guard` that knows the Trainer: its clipping, and the schedulers that wait.

    Args:
        skip_nonfinite: see `Guard`.
        scaler: see `Guard`.
        hold_schedulers: whether learning rate schedulers wait where a step is left out.
    """

    def __init__(
        self,
        *,
        skip_nonfinite: bool = True,
        scaler: NoScaler | None = None,
        hold_schedulers: bool = True,
    ) -> None:
        super().__init__(skip_nonfinite=skip_nonfinite, scaler=scaler)
        self._hold = SchedulerHold(on=hold_schedulers)

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
        if self.passes(optimizer):
            unguarded: Any = Precision.optimizer_step
            return unguarded(plugin, optimizer, model, closure, **kwargs)
        trainer = model.trainer

        def left_out(skip: bool) -> None:
            self._hold.hold(trainer)
            if skip:
                self.name_overflow(trainer.lightning_module, trainer.global_step)

        return self.guarded(
            optimizer,
            closure,
            lambda: self._around_clipping(plugin, optimizer, model),
            inside=closure is not do_nothing_closure and not calls_closure_once(optimizer),
            settles=model.automatic_optimization,
            left_out=left_out,
            **kwargs,
        )

    def _around_clipping(
        self, plugin: Precision, optimizer: Optimizer, model: LightningModule
    ) -> Tensor:
        """The norm before clipping; clipping by norm computes it anyway, see `clipped`."""
        self._norm = None
        if is_overridden("configure_gradient_clipping", model):
            self._norm = gradient_norm(optimizer)
        plugin._after_closure(model, optimizer)  # pyright: ignore[reportArgumentType]
        return gradient_norm(optimizer) if self._norm is None else self._norm

    # -- schedulers -----------------------------------------------------------------------------

    def begin(self, trainer: Trainer) -> None:
        """At the begin of a batch: schedulers go on."""
        self._hold.release(trainer)
        self._late.next_batch()
        # Its gradients are still there. To name the layer is not worth waiting for the device, and
        # several ranks would have to do it together.
        if trainer.world_size == 1 and self._late.already():
            self.name_overflow(trainer.lightning_module, trainer.global_step - 1)

    def end_training_step(self, trainer: Trainer) -> None:
        """In manual optimization schedulers wait, and the loss scale stays, to the step's end."""
        if not trainer.lightning_module.automatic_optimization:
            self._hold.release(None)
            self.scaler.settle()


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
