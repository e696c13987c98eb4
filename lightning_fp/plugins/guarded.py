"""GuardedPrecision: a precision plugin that looks at the gradients before each optimizer step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.plugins.guard import StepGuard, gradient_norm, unwrapped
from lightning_fp.plugins.loss_scaler import LossScaler


class GuardedPrecision(Precision):
    """A base precision, the loss scale that it may need, and the guard before optimizer steps.

    Args:
        base: Lightning's own plugin for the base precision, or ours.
        scaler: scales the loss, if the base is FP16.
        hold_schedulers: whether learning rate schedulers wait where a step is left out.
    """

    def __init__(
        self, base: Precision, scaler: LossScaler | None, *, hold_schedulers: bool
    ) -> None:
        self._base = base
        self.scaler = scaler
        """Scales the loss, if the base is FP16."""
        self._hold_schedulers = hold_schedulers
        self.guard: StepGuard | None = None
        """Looks at the gradients before each optimizer step, under FP16 or if asked to."""
        self.stop_guarding()

    # -- the guard ------------------------------------------------------------------------------

    def start_guarding(self, *, skip_nonfinite: bool = True) -> StepGuard:
        """The guard, which keeps a record of each step from here on.

        Args:
            skip_nonfinite: whether steps with inf or NaN gradients are left out; under a loss
                scale they are in any case.
        """
        if self.guard is None:
            self.guard = StepGuard()
        self.guard.skip_nonfinite = skip_nonfinite or self.scaler is not None
        self.guard.keeps_record = True
        return self.guard

    def stop_guarding(self) -> None:
        """Nobody asks for the guard any more; FP16 needs one all the same."""
        self.guard = None
        if self.scaler is not None:
            self.guard = StepGuard(scaler=self.scaler, hold_schedulers=self._hold_schedulers)
            self.guard.keeps_record = False

    # -- the base precision ---------------------------------------------------------------------

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """As the base precision."""
        return self._base.tensor_init_context()

    @override
    def module_init_context(self) -> AbstractContextManager[Any]:
        """As the base precision."""
        return self._base.module_init_context()

    # -- gradients ------------------------------------------------------------------------------

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """As Lightning's, of gradients without the loss scale, in manual optimization too."""
        if self.scaler is not None and clip_val > 0:
            self.scaler.unscale(unwrapped(optimizer))
        super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float = 0.0) -> None:
        """As Lightning's; the guard hears of the norm, so that it is computed once."""
        norm = torch.nn.utils.clip_grad_norm_(list(self.main_params(optimizer)), clip_val)
        if self.guard is not None:
            self.guard.clipped(norm)

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float = 0.0) -> None:
        """As Lightning's; the guard looks before, since inf is not to be seen afterwards."""
        if self.guard is not None:
            self.guard.clipped(gradient_norm(optimizer))
        super().clip_grad_by_value(optimizer, clip_val)
