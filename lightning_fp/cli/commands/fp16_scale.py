"""Which loss scale a model's gradients want in FP16, found out on one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_fp.cli.loading import find_factory
from lightning_fp.stepping.overflows import counts, first_overflow

SCALES = tuple(2.0**power for power in range(0, 25, 2))
"""From no scaling to the largest that `LossScaling` grows to by default."""

MARGIN = 4.0
"""By so much the advice stays below the largest scale that held: other batches may have larger
gradients."""


@dataclass(frozen=True, kw_only=True)
class ScaleProbe:
    """The gradients of one batch under one loss scale."""

    scale: float
    zero: float
    """Share of elements that are zero: flushed, or nothing there to begin with."""

    subnormal: float
    """Share of elements below FP16's least normal number, which have lost bits."""

    overflow: str | None
    """The layer that overflowed first; None if none did."""


def probe_scales(
    loss: Callable[[], Tensor], model: nn.Module, scales: Sequence[float] = SCALES
) -> list[ScaleProbe]:
    """Forward and backward under FP16 autocast, once for each scale.

    Args:
        loss: runs forward on one batch; the same each time.
        model: float32; its gradients are dropped.
        scales: to multiply the loss by.

    Returns:
        By scale.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device.type
    one = torch.ones((), device=parameters[0].device)
    probes: list[ScaleProbe] = []
    for scale in scales:
        model.zero_grad(set_to_none=True)
        with torch.random.fork_rng(), torch.autocast(device, dtype=torch.float16):
            scaled = loss().float() * scale
        scaled.backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        all, zero, small, _ = counts(gradients, one).sum(0).tolist()
        probes.append(
            ScaleProbe(
                scale=scale,
                zero=zero / all,
                subnormal=small / all,
                overflow=first_overflow(model),
            )
        )
    model.zero_grad(set_to_none=True)
    return probes


def advice(probes: Sequence[ScaleProbe]) -> str:
    """What to begin with, as a sentence."""
    held = [probe.scale for probe in probes if probe.overflow is None]
    if not held:
        return (
            "gradients overflow at every scale: FP16 does not hold this model's, train in bf16 or"
            " look at its initialization"
        )
    best = max(max(held) / MARGIN, 1.0)
    return (
        f"begin with LossScaling(init_scale={best:g}): {max(held):g} is the largest scale that held"
        " on this batch, and other batches may have larger gradients"
    )


def load_loss(reference: str, device: str) -> tuple[Callable[[], Tensor], nn.Module]:
    """A loss to run, from a factory.

    Args:
        reference: "package.module:factory" or "path/to/file.py:factory"; it takes no arguments and
            returns a LightningModule and a batch for its `training_step`, or a module and a
            function of it that returns a loss.
        device: "cpu" or "cuda".

    Raises:
        ValueError: if it returns something else.
    """
    built: Any = find_factory(reference)()
    model, rest = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module) or rest is None:
        raise ValueError(
            f"{reference} must return (LightningModule, batch) or (module, loss), where"
            f" loss(module) runs one batch; got {type(built).__name__}"
        )
    model.to(device).float().train()
    if not isinstance(model, L.LightningModule):
        if not callable(rest):
            raise ValueError(
                f"{reference} must return a function of the module that gives a loss beside it, got"
                f" {type(rest).__name__}"
            )
        function: Any = rest
        return lambda: function(model), model
    module = model
    silent: dict[str, Any] = {name: lambda *_, **__: None for name in ("log", "log_dict")}
    vars(module).update(silent)  # there is no Trainer to log to
    batch = module.transfer_batch_to_device(rest, torch.device(device), 0)

    def loss() -> Tensor:
        output: Any = module.training_step(batch, 0)
        found = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(found, Tensor):
            raise ValueError(f"training_step must return a loss, got {type(found).__name__}")
        return found

    return loss, module
