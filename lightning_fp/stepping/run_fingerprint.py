"""What a training step can change in any run: for a rehearsal to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_fp.layers import PrecisionMap
from lightning_fp.stability.keep.random_state import RandomState
from lightning_fp.stability.replay.fingerprint import Fingerprint
from lightning_fp.stepping.loss_scaler import LossScaler


def look_at_run(
    taken: Fingerprint,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    table: PrecisionMap,
    scaler: LossScaler | None,
) -> None:
    """Look at Parameters, buffers, optimizers, formats, random state and settings.

    Args:
        taken: adds them.
        model: what is trained.
        optimizers: all there are.
        table: the formats.
        scaler: scales the loss, if anything does.
    """
    for name, parameter in model.named_parameters():
        taken.add("", f"the Parameter {name}", parameter)
        taken.add("", f"the gradient of {name}", parameter.grad)
        for attribute, value in vars(parameter).items():
            taken.add("", f"the attribute {attribute} of the Parameter {name}", value)
    for name, buffer in model.named_buffers():
        taken.add("", f"the buffer {name}", buffer)
    _optimizers(taken, model, optimizers)
    taken.whole("the table of formats", table.state_dict())
    taken.whole("the records of amax", [table.scale_history.recorded, table.scale_history.headroom])
    if scaler is not None:
        taken.whole("the loss scale", vars(scaler.state))
    for name, state in vars(RandomState.capture()).items():
        taken.whole(f"the random state of {name}", state)
    taken.whole("the settings of torch", _settings())


def _optimizers(taken: Fingerprint, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        owner = type(optimizer).__name__
        for key, state in optimizer.state.items():
            of = names.get(id(key), "another tensor")
            entries: dict[str, Any] = state if isinstance(state, dict) else {"": state}
            for name, value in entries.items():
                taken.add(owner, f"the state {name} of {of}", value)
        for index, group in enumerate(optimizer.param_groups):
            for name, value in group.items():
                value = [id(each) for each in value] if name == "params" else value
                taken.add(owner, f"{name} of parameter group {index}", value)


def _settings() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "matmul precision": torch.get_float32_matmul_precision(),
    }
