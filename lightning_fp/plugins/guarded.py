"""GuardedPrecision: a precision plugin that looks at the gradients before each optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

from lightning.fabric.utilities.types import Steppable
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.plugins.guard import StepGuard, unwrapped
from lightning_fp.stability.loss_scaling import LossScaling
from lightning_fp.stepping.base_answers import BaseAnswers
from lightning_fp.stepping.base_precision import Base, BaseLike, base_precision, read_base
from lightning_fp.stepping.gradients import clip_by_norm, gradient_norm
from lightning_fp.stepping.half_checks import sees_scaled_gradients
from lightning_fp.stepping.scaled_derivatives import hold_scale


class GuardedPrecision(BaseAnswers, Precision):
    """A base precision, the loss scale that it may need, and the guard before optimizer steps.

    Args:
        base: the name of the base precision.
        loss_scaling: how the loss is scaled where the base is FP16; None takes the defaults.
        hold_schedulers: whether learning rate schedulers wait where a step is left out.

    Raises:
        ValueError: for an unknown base, or one that needs no loss scale and was given one.
    """

    precision: Base  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, base: BaseLike, *, loss_scaling: LossScaling | None, hold_schedulers: bool
    ) -> None:
        base = read_base(base)
        self.base = base_precision(base, loss_scaling, hold_schedulers=hold_schedulers)
        """What everything but the layers computes in."""
        self.precision = base
        self._looked_for_hooks = False
        self.guard = self._own_guard()
        """Looks at the gradients before each optimizer step, under FP16 or if asked to."""

    # -- the guard ------------------------------------------------------------------------------

    def _own_guard(self) -> StepGuard | None:
        if not self.base.needs_guard:
            return None
        hold = self.base.hold_schedulers
        guard = StepGuard(scaler=self.base.scaler, hold_schedulers=hold)
        guard.keeps_record = False
        return guard

    def start_guarding(self, *, skip_nonfinite: bool = True) -> StepGuard:
        """The guard, which keeps a record of each step from here on.

        Args:
            skip_nonfinite: whether steps with inf or NaN gradients are left out; under a loss
                scale they are in any case.
        """
        if self.guard is None:
            self.guard = StepGuard()
        self.guard.skip_nonfinite = skip_nonfinite or self.base.scaler.must_skip
        self.guard.keeps_record = True
        return self.guard

    def stop_guarding(self) -> None:
        """Nobody asks for the guard any more; FP16 needs one all the same."""
        self.guard = self._own_guard()

    # -- the base precision ---------------------------------------------------------------------

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """As the base precision."""
        return self.base.arithmetic.init_context()

    @override
    def module_init_context(self) -> AbstractContextManager[Any]:
        """As the base precision."""
        return self.base.arithmetic.init_context()

    # -- gradients ------------------------------------------------------------------------------

    @override
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tensor: Tensor,
        model: LightningModule,
        optimizer: Steppable | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Backward of the scaled loss; hooks have seen the loss itself."""
        if self.base.scaler.must_skip and not self._looked_for_hooks:
            self._looked_for_hooks = True
            if told := sees_scaled_gradients(model):
                rank_zero_warn(told)
        if kwargs.get("create_graph") and (told := hold_scale(self.base.scaler)):
            rank_zero_warn(told)
        super().backward(self.base.scaler.scaled(tensor), model, optimizer, *args, **kwargs)

    @override
    def optimizer_step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        optimizer: Steppable,
        model: LightningModule,
        closure: Callable[[], Any],
        **kwargs: Any,
    ) -> Any:
        """The optimizer's step, under the eyes of the guard if there is one."""
        if self.guard is None:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        return self.guard.step(self, cast(Optimizer, optimizer), model, closure, **kwargs)

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """As Lightning's, of gradients without the loss scale, in manual optimization too."""
        if clip_val > 0:
            self.base.scaler.unscale(unwrapped(optimizer))
        super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float = 0.0) -> None:
        """As Lightning's, of all kinds of gradients; the guard hears of the norm, computed once."""
        norm = clip_by_norm(optimizer, clip_val)
        if self.guard is not None:
            self.guard.clipped(norm)

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float = 0.0) -> None:
        """As Lightning's; the guard looks before, since inf is not to be seen afterwards."""
        if self.guard is not None:
            self.guard.clipped(gradient_norm(optimizer))
        super().clip_grad_by_value(optimizer, clip_val)
