"""What is asked of an optimizer and its gradients before it steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """All gradients of an optimizer's parameters."""
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """Norm of all gradients of an optimizer, over all shards.

    Args:
        optimizer: its parameters' `.grad` are read.

    Returns:
        Scalar on the gradients' device; 0 where there are none.
    """
    gradients = [
        gradient.coalesce().values() if gradient.is_sparse else gradient
        for gradient in gradients_of(optimizer)
    ]
    if not gradients:
        return torch.zeros(())
    return whole_norm(torch.nn.utils.get_total_norm(gradients))


@torch.no_grad()
def clip_sparse(optimizer: Optimizer, max_norm: float) -> Tensor:
    """Clip gradients by their norm where some are sparse, which torch refuses.

    Returns:
        The norm before.
    """
    norm = gradient_norm(optimizer)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.device))
    return norm


def whole_norm(norm: Any) -> Tensor:
    """A norm over shards is a sharded tensor itself."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def calls_closure_itself(optimizer: Optimizer) -> bool:
    """Whether an optimizer runs forward and backward itself, as often as it likes."""
    if isinstance(optimizer, LBFGS):
        return True
    step = _step_parameters(optimizer).get("closure")
    return step is not None and step.default is inspect.Parameter.empty


def calls_closure_once(optimizer: Optimizer) -> bool:
    """Whether an optimizer is known to call its closure once, before all else: torch's own are."""
    return (getattr(type(optimizer).step, "__module__", None) or "").startswith("torch.optim.")


def takes_closure(optimizer: Optimizer) -> bool:
    """Whether `step` can be given a closure; those of research code often cannot."""
    kinds = inspect.Parameter
    found = _step_parameters(optimizer).values()
    return not found or any(p.name == "closure" or p.kind is kinds.VAR_KEYWORD for p in found)


def _step_parameters(optimizer: Optimizer) -> Mapping[str, inspect.Parameter]:
    """None of a step that is no Python function: one in C has no signature, a mock any."""
    step = type(optimizer).step
    return inspect.signature(step).parameters if inspect.isfunction(step) else {}
