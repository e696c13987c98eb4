"""Forwards as a training step's, for numbers that are to be compared with it: save for dropout."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_fp.layers.table_owner import TableOwner
from lightning_fp.stepping.base_precision import BasePrecision


@contextmanager
def as_trained(
    model: nn.Module,
    owner: TableOwner,
    base: BasePrecision,
    forward: Callable[[], AbstractContextManager[object]],
) -> Generator[None, None, None]:
    """Forwards in the formats of the coming training step, between two steps.

    They leave no trace in histories and statistics. Layers that normalise by the batch go on doing
    so, or the numbers were others; their running statistics are put back.

    Args:
        model: what is called.
        owner: of the table of its formats.
        base: what everything else computes in.
        forward: stands around a forward in the base precision.
    """
    table = owner.precision_map
    within_step = table.phase.evaluating is False
    if not (table.frozen or within_step):
        owner.boundary()  # what waits for the coming step is in force in it
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    phase, fast = table.phase.evaluating, torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it multiplies without the layers
    try:
        with modes(model, norms), table.overridden({}):
            table.phase.evaluating = False
            with forward(), table.forward_context():
                yield
    finally:
        table.phase.evaluating = phase
        base.copies.take_back()
        torch.backends.mha.set_fastpath_enabled(fast)
        with torch.no_grad():
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)


@contextmanager
def modes(model: nn.Module, as_they_are: Sequence[nn.Module]) -> Generator[None, None, None]:
    """Every module in eval mode, but for some."""
    before = [(module, module.training) for module in model.modules()]
    kept = {id(module) for module in as_they_are}
    for module, _ in before:
        module.training = module.training and id(module) in kept
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
