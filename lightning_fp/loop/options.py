"""What a PrecisionLoop is given, read and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_fp.layers import Frozen
from lightning_fp.loop.steps.optimizer_steps import ddp_of
from lightning_fp.shown import shown

Optimizers = Optimizer | Sequence[Optimizer]
Schedulers = LRScheduler | Sequence[LRScheduler]


class Fabric(Protocol):
    """What a loop needs of Lightning's Fabric."""

    def backward(self, tensor: Tensor) -> None:
        """Run backward."""
        ...


def part_options(name: str, given: bool | Mapping[str, Any], kind: type[Any]) -> Any:
    """The options of a part; None if there is to be none.

    Args:
        name: of the option of `PrecisionLoop`.
        given: whether to have the part, or its options.
        kind: the class of the options.

    Raises:
        ValueError: for an option that there is not, or out of range.
    """
    if not given:
        return None
    try:
        return kind() if given is True else kind(**given)
    except TypeError as error:
        raise ValueError(f"{name} must be a bool or its options, got {given!r}: {error}") from error


def read_optimizers(given: Any) -> list[Optimizer]:
    """The optimizers, out of Fabric's wrappers.

    Args:
        given: one, or several that step together.

    Raises:
        ValueError: for anything else.
    """
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    optimizers = [getattr(each, "optimizer", each) for each in several]
    strange = [each for each in optimizers if not isinstance(each, Optimizer)]
    if strange or not optimizers:
        got = type(strange[0]).__name__ if strange else "none"
        raise ValueError(
            f"optimizer must be a torch.optim.Optimizer, or a list of those that step together, got"
            f" {got}"
        )
    return optimizers


def read_schedulers(given: Any) -> list[LRScheduler]:
    """The schedulers, which step after each step that was made.

    Args:
        given: one, several, or None.

    Raises:
        ValueError: for one that asks for a metric.
    """
    schedulers = list(given) if isinstance(given, (list, tuple)) else [given] * (given is not None)
    if any(isinstance(each, ReduceLROnPlateau) for each in schedulers):
        raise ValueError(
            "scheduler must not be ReduceLROnPlateau, which asks for a metric: leave scheduler out,"
            " and call its step(metric) after your evaluation"
        )
    return schedulers


def check_fabric(fabric: Any) -> None:
    """Refuse a Fabric that brings a precision of its own.

    Raises:
        ValueError: naming it.
    """
    if not callable(getattr(fabric, "backward", None)):
        raise ValueError(f"fabric must be a lightning.Fabric or None, got {fabric!r}")
    plugin: Any = getattr(fabric, "_precision", None)
    if getattr(plugin, "precision", "32-true") != "32-true":
        raise ValueError(
            "fabric must have precision '32-true' beside a PrecisionLoop, which brings its own, got"
            f" {plugin.precision!r}; leave Fabric's precision out, and give base= to the loop"
        )


def check_groups(**groups: Any) -> None:
    """Refuse what is no group of ranks, or one of others.

    Args:
        groups: by the option's name.

    Raises:
        ValueError: naming the option.
    """
    for name, group in groups.items():
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"{name} must be one that this process is in, got one without rank"
                f" {dist.get_rank()}; make the loop on the ranks of the group alone"
            )
        if not (group is None or isinstance(group, dist.ProcessGroup)):
            raise ValueError(
                f"{name} must be a torch.distributed.ProcessGroup or None, got {shown(group)};"
                " give what torch.distributed.new_group returns"
            )


def check_frozen(frozen: Frozen, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse to store frozen weights that others go on holding, so that nothing would be saved.

    Raises:
        ValueError: naming who holds them.
    """
    if frozen != "stored":
        return
    if ddp_of(model) is not None:
        raise ValueError(
            "frozen must be 'kept' for a model in DistributedDataParallel, got 'stored': the"
            " wrapper holds the weights; under a Trainer the model is converted before it is"
            " wrapped"
        )
    groups = [group for each in optimizers for group in each.param_groups]
    if any(not p.requires_grad for group in groups for p in group["params"]):
        raise ValueError(
            "frozen must be 'kept' where the optimizer has frozen Parameters, got 'stored': it"
            " would go on holding their weights; give it those that are trained, [p for p in"
            " model.parameters() if p.requires_grad]"
        )
