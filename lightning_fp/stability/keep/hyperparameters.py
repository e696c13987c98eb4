"""The plain numbers of optimizers: learning rates, momenta, and whatever else a group holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_PLAIN = (bool, int, float, str, type(None))


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The plain numbers of each parameter group: lr, betas, weight_decay, ..."""
    return [
        {name: _plain(value) for name, value in group.items() if _is_plain(value)}
        for group in optimizer.param_groups
    ]


def set_hyperparameters(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Give each parameter group the plain numbers it had, see `hyperparameters`."""
    for group, values in zip(optimizer.param_groups, groups, strict=False):
        for name, value in values.items():
            if isinstance(group.get(name), Tensor):
                group[name].fill_(value)
            else:
                group[name] = value


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(item, _PLAIN) for item in value)  # pyright: ignore
    return isinstance(value, _PLAIN) or (isinstance(value, Tensor) and value.numel() == 1)


def _plain(value: Any) -> Any:
    """A learning rate may be a tensor, which its scheduler changes in place."""
    return value.detach().clone() if isinstance(value, Tensor) else value
