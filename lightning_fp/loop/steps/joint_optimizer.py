"""JointOptimizer: several optimizers that step together, after one backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from typing_extensions import override

from lightning_fp.stepping.gradients import calls_closure_itself, takes_closure


class JointOptimizer(Optimizer):
    """All of them step, or none: so gradients are looked at, scaled and clipped as one.

    Args:
        optimizers: of different Parameters.

    Raises:
        ValueError: for optimizers that share a Parameter, or one that runs forward and backward
            itself.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        # Not `super().__init__`: that would make groups and a state of its own.
        self.optimizers = tuple(optimizers)
        itself = [each for each in self.optimizers if calls_closure_itself(each)]
        if itself and len(self.optimizers) > 1:
            raise ValueError(
                f"optimizer must not have {type(itself[0]).__name__} among several: it runs forward"
                " and backward itself, between the steps of the others; give it alone"
            )
        parameters = [id(p) for group in self.param_groups for p in group["params"]]
        if len(set(parameters)) < len(parameters):
            raise ValueError(
                "optimizer must be several of different Parameters, got some in two of them; leave"
                " each to one"
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore
        """Those of all; in the order of the optimizers."""
        return [group for each in self.optimizers for group in each.param_groups]

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        for each in self.optimizers:
            each.zero_grad(set_to_none)

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Each steps; the closure is run once, before all of them."""
        result = None if closure is None else closure()
        for each in self.optimizers:
            each.step()
        return result

    @override
    def __repr__(self) -> str:
        return f"JointOptimizer({', '.join(type(each).__name__ for each in self.optimizers)})"


def as_one(optimizers: Sequence[Optimizer]) -> Optimizer:
    """What steps: the one there is, or all as one.

    Args:
        optimizers: of a run.

    Raises:
        ValueError: see `JointOptimizer`.
    """
    (first, *more) = optimizers
    return first if not more and takes_closure(first) else JointOptimizer(optimizers)
