"""What is asked of an optimizer and its gradients before it steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
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
    return total_norm(gradients)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Norm of all gradients together, also where each mesh has some of them, and none has others.

    Under tensor parallelism torch's own function refuses those of layers that are not sharded.

    Args:
        gradients: dense, at least one.
    """
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(_mesh(gradient), []).append(gradient)
    norms = [whole_norm(torch.nn.utils.get_total_norm(each)) for each in by_mesh.values()]
    if len(norms) == 1:
        return norms[0]
    return torch.nn.utils.get_total_norm([norm.to(norms[0].device) for norm in norms])


def _mesh(gradient: Tensor) -> DeviceMesh | None:
    """That a gradient is sharded over; None of a plain tensor."""
    return gradient.device_mesh if isinstance(gradient, DTensor) else None


@torch.no_grad()
def clip_by_norm(optimizer: Optimizer, max_norm: float) -> Tensor:
    """Clip all gradients by their norm, as torch does, of kinds that it refuses too.

    Those are sparse ones, and under tensor parallelism those of several meshes.

    Args:
        optimizer: its parameters' `.grad` are scaled down in place.
        max_norm: the largest norm that is left as it is.

    Returns:
        The norm before, a scalar.
    """
    gradients = gradients_of(optimizer)
    if len(set(map(_mesh, gradients))) < 2 and not any(g.is_sparse for g in gradients):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return whole_norm(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    norm = gradient_norm(optimizer)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))
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
    return _parameters(step) if inspect.isfunction(step) else {}


@lru_cache(maxsize=64)
def _parameters(step: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Looked up at every step."""
    return inspect.signature(step).parameters
