"""Signals of the forward: kurtosis of what linear layers are given, and the logits of the output.

Hooks on the model look at a few evenly spaced rows. The target of a row of logits is read off its
gradient, since who measures does not know the batch: of a cross-entropy it is negative there and
nowhere else, with label smoothing most negative there. In code compiled by torch.compile nothing is
looked at: hooks would become part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fp.numerics.sharpness import kurtosis, logit_sharpness
from lightning_fp.telemetry.stability.step_values import StepValues

ROWS = 64
"""Rows of a tensor that are looked at."""


class ForwardSignals:
    """Watches a model's forwards in training.

    Args:
        model: whose.
        head: the name of the layer whose output is the logits; None: the last linear layer.
        values: where signals go.
        active: whether a forward is one of the run's own, and not of a replay.

    Raises:
        ValueError: if there is no such layer.
    """

    def __init__(
        self, model: nn.Module, head: str | None, values: StepValues, active: Callable[[], bool]
    ) -> None:
        self._values, self._active = values, active
        self.head = head_of(model, head)
        """Its name; None where the model has no linear layer."""
        hooks: list[Any] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.append(module.register_forward_pre_hook(self._before_linear))
            if name == self.head:
                hooks.append(module.register_forward_hook(self._after_head))
        self._hooks = hooks

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _watches(self, module: nn.Module) -> bool:
        return (
            not torch.compiler.is_compiling()
            and module.training
            and torch.is_grad_enabled()
            and self._active()
        )

    def _before_linear(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._watches(module) and args and isinstance(args[0], Tensor) and args[0].numel():
            self._values.add("activation_kurtosis", kurtosis(rows_of(args[0])))

    def _after_head(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (self._watches(module) and isinstance(output, Tensor) and output.numel()):
            return
        logits = rows_of(output.detach()).clone()  # before anybody changes them in place
        self._values.add("output_logit_max", logits.abs().amax())
        if output.requires_grad and output.shape[-1] > 1:
            output.register_hook(partial(self._gradient, logits))

    def _gradient(self, logits: Tensor, gradient: Tensor) -> None:
        if self._active():
            self._values.add("logit_sharpness", sharpness_by_gradient(logits, rows_of(gradient)))


def sharpness_by_gradient(logits: Tensor, gradient: Tensor) -> Tensor:
    """Mean sharpness of the rows whose gradient is that of a cross-entropy.

    Args:
        logits: [rows, classes].
        gradient: [rows, classes], of the loss by them, in any scale.

    Returns:
        float32 scalar; NaN if there is no such row.
    """
    lowest, targets = gradient.detach().float().min(dim=-1)
    # It adds up to zero: what pulls the target up pushes all others down. Padded rows are all zero.
    off = gradient.float().sum(dim=-1).abs() > 0.05 * lowest.abs()
    phi = logit_sharpness(logits, targets)
    return torch.where((lowest < 0) & ~off, phi, torch.nan).nanmean()


def rows_of(x: Tensor) -> Tensor:
    """A few evenly spaced rows; a view where that can be.

    Args:
        x: [..., columns].

    Returns:
        [at most 64, columns].
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows[:: -(-rows.shape[0] // ROWS)]


def head_of(model: nn.Module, head: str | None) -> str | None:
    """The name of the layer whose output is the logits.

    Args:
        model: the model.
        head: a name, to be checked; None takes the last linear layer.

    Raises:
        ValueError: if there is no such layer.
    """
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if head is None:
        return linear[-1] if linear else None
    if head not in modules:
        raise ValueError(
            f"head must be the name of a module, got {head!r}; linear layers are"
            f" {', '.join(linear[-3:]) or 'none'}"
        )
    return head
