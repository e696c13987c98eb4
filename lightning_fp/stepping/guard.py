"""Guard: looks at the gradients before an optimizer's step, and leaves it out where it must."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fp.stability.keep.hyperparameters import hyperparameters, set_hyperparameters
from lightning_fp.stepping.gradients import calls_closure_itself, gradients_of, whole_norm
from lightning_fp.stepping.late_flags import LateFlags
from lightning_fp.stepping.loss_scaler import NoScaler
from lightning_fp.stepping.overflows import first_overflow
from lightning_fp.telemetry import OptimizerStep

log = logging.getLogger(__name__)

MOST_NAMED = 128
"""Steps left out of which the guard remembers the layer."""


class Guard:
    """Runs the closure, looks at the gradients, and steps or skips; in any loop.

    A fused optimizer on CUDA takes the finding as a device flag, and the host hears of it a step
    later; for others one scalar is waited for. An optimizer that has to call its closure itself,
    such as LBFGS, steps unguarded.

    Args:
        skip_nonfinite: whether a step with an inf or NaN gradient is left out.
        scaler: scales the loss, if anything does.
    """

    def __init__(self, *, skip_nonfinite: bool = True, scaler: NoScaler | None = None) -> None:
        self.skip_nonfinite = skip_nonfinite
        self.scaler = scaler or NoScaler()
        self.keeps_record = True
        """Whether somebody takes `steps` out."""
        self.steps: list[OptimizerStep] = []
        """The steps since somebody took them out, one for each optimizer that stepped."""
        self.overflowed: dict[int, str] = {}
        """By the number of steps left out last, the layer that overflowed first."""
        self.left_out = 0
        """How many steps were left out, as far as the host has heard."""
        self.over_ranks: Callable[[Tensor], Tensor] = lambda finite: finite
        """What all ranks say of their gradients; a rank's own, where it has a part of all."""
        self.replaying = False
        """Whether steps belong to a replay: they are guarded, and neither kept nor held."""
        self.replay_skipped = False
        """Whether a step of a replay was left out, since somebody set this to False."""
        self.replay_hyperparameters: list[dict[str, Any]] | None = None
        """What a replay's optimizer steps with, if that is known."""
        self._norm: Tensor | None = None
        self._late = LateFlags()
        self._warned = False

    def passes(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer steps unguarded; to be asked before each step."""
        if self.replay_hyperparameters is not None:
            set_hyperparameters(optimizer, self.replay_hyperparameters)
        if not calls_closure_itself(optimizer):
            return False
        if not self._warned:
            log.warning(
                "%s calls its closure itself and steps unguarded: steps with inf or NaN gradients"
                " are not skipped",
                type(optimizer).__name__,
            )
        self._warned = True
        return True

    def guarded(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        clip: Callable[[], Tensor],
        *,
        inside: bool,
        settles: bool = True,
        left_out: Callable[[bool], object] = lambda _: None,
        **kwargs: Any,
    ) -> Any:
        """One optimizer's step.

        Args:
            optimizer: what steps.
            closure: runs forward and backward, if that is not done yet.
            clip: clips the gradients, and returns their norm before.
            inside: whether the optimizer runs the closure, when and as often as it likes.
            settles: whether the loss scale moves with this step.
            left_out: told that a step was left out: by us, at once; else by a kernel, a step late.
            kwargs: go to the optimizer.

        Returns:
            What the optimizer returned; what the closure returned if the step was skipped.
        """
        groups = hyperparameters(optimizer)

        def look() -> tuple[Tensor, Tensor]:
            self.scaler.unscale(optimizer)
            norm = clip()
            return norm, self.over_ranks(torch.isfinite(norm))

        if inside:
            output, norm, skip = self._inside(optimizer, closure, look, kwargs)
            finite = torch.isfinite(norm)
            if self.skip_nonfinite:  # any pass may have been it, and the norm is the last one's
                finite = torch.full_like(finite, not skip)
        else:
            result = closure()
            norm, finite = look()
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
            self.left_out += 1
            left_out(skip)
        # Made on the device: a copy from the host would wait for it.
        skipped = ~finite if self.skip_nonfinite else torch.zeros_like(finite)
        if self.keeps_record:
            seen = OptimizerStep(grad_norm=norm, skipped=skipped, hyperparameters=groups)
            self.steps.append(seen)
        self.scaler.update(finite)
        if settles:
            self.scaler.settle()
        if skip or late:
            self.scaler.check()
        return output

    def _inside(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        look: Callable[[], tuple[Tensor, Tensor]],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Tensor, bool]:
        """The optimizer runs the closure when and as often as it likes, as without a guard.

        Sharpness-aware optimizers do so twice, at different weights. Gradients that are not finite
        end the step at its first pass. An optimizer that has moved its weights by then, as later
        ones have, must put them back, so it goes on, with gradients of zero.

        Returns:
            The optimizer's output, the norm of the last pass, whether the step was left out.
        """
        norms: list[Tensor] = []
        skipped = False
        self.scaler.unscale(optimizer)  # what is accumulated so far: it may look at it first
        start = _versions(optimizer)

        def guarded() -> Any:
            nonlocal skipped
            moved = bool(norms) or _versions(optimizer) != start
            result = closure()
            norm, finite = look()
            norms.append(norm)
            if self.skip_nonfinite and not bool(finite):
                skipped = True
                if not moved:
                    raise _LeftOutError(result)
                for gradient in gradients_of(optimizer):
                    gradient.zero_()
            return result

        try:
            output = optimizer.step(closure=guarded, **kwargs)
        except _LeftOutError as left_out:
            output = left_out.args[0]
        return output, norms[-1] if norms else torch.zeros(()), skipped

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

    def next_batch(self) -> None:
        """What kernels have found out about the step before may be read from now on."""
        self._late.next_batch()

    def clipped(self, norm: Tensor) -> None:
        """Hear the norm that clipping has computed."""
        if self._norm is None:
            self._norm = whole_norm(norm)

    def name_overflow(self, model: nn.Module, step: int) -> None:
        """Remember the layer that overflowed; gradients stay until the next backward.

        Args:
            model: whose gradients they are.
            step: under which number.
        """
        layer = first_overflow(model)
        if layer is not None:
            self.overflowed[step] = layer
        while len(self.overflowed) > MOST_NAMED:
            del self.overflowed[next(iter(self.overflowed))]


def _versions(optimizer: Optimizer) -> list[int]:
    """What tells that an optimizer has written to its Parameters, unless by `.data`."""
    return [p._version for group in optimizer.param_groups for p in group["params"]]


class _LeftOutError(Exception):
    """Leaves an optimizer's step from inside of its closure; carries the closure's result."""
