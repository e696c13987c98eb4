"""The demo's faults in loops of one's own, beside the Trainer's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fp import DivergenceDetector, PrecisionFallback
from lightning_fp.demo.data import read_sources
from lightning_fp.demo.faults import fault_plugin, fault_run
from lightning_fp.demo.faults.base import Fault
from lightning_fp.demo.faults.corruption import ForwardCorruption
from lightning_fp.demo.faults.innocent import Batch, DataFault, NaNData, ShuffledLabels
from lightning_fp.demo.faults.run import TinyBatches, TinyByteGPT
from lightning_fp.demo.faults.scaling import GradientBursts, StuckScale
from lightning_fp.events import Demotion, Event, Verdict
from lightning_fp.loop import PrecisionLoop
from lightning_fp.records import read_events

Own = Literal["plain", "fabric"]

TOLD = ("suspect", "verdict", "demote", "promote", "rollback", "skip", "limit", "rehearsal")
"""Kinds of events that must be the same in every loop."""

START = 24
STEPS = 35

SHORT: dict[str, tuple[str, Callable[[], Fault | DataFault | None]]] = {
    "noise": (
        "fp8-dynamic",
        lambda: ForwardCorruption("head", kind="noise", strength=0.5, start=START),
    ),
    "overflow": ("fp8-delayed", lambda: GradientBursts("head", bits=30, every=1, start=START)),
    "bursts": ("fp8-delayed", lambda: GradientBursts("blocks.*", bits=32, every=4, start=START)),
    "stuck": ("fp8-delayed", lambda: StuckScale("blocks.0.*", bits=10, start=START)),
    "labels": ("fp8-delayed", lambda: ShuffledLabels(start=START, batches=6)),
    "nan": ("fp8-delayed", lambda: NaNData(start=START, batches=2)),
}
"""Faults that begin early, for a watch that is armed early; the last two are innocent."""

INNOCENT = ("labels", "nan")


def watch() -> dict[str, Any]:
    """Options of a watch that is armed early."""
    return {"detector": DivergenceDetector(armed=16), "snapshot_every_n_steps": 8}


def told(directory: Path) -> list[tuple[int, str, str]]:
    """What was decided, and when, without times and bytes."""
    events = [event for event in read_events(directory) if event.kind in TOLD]
    return [(event.step, event.kind, _essence(event)) for event in events]


def kinds(directory: Path) -> list[str]:
    """Of what was decided."""
    return [kind for _, kind, _ in told(directory)]


def _essence(event: Event) -> str:
    if isinstance(event, Demotion):
        return str(sorted(event.formats.items()))
    return event.reason if isinstance(event, Verdict) else ""


def in_the_trainer(
    fault: Fault | DataFault | None,
    scaling: str,
    steps: int,
    directory: Path,
    blocks: int = 2,
    **options: Any,
) -> dict[str, Tensor]:
    """Train in a Trainer, and give the weights."""
    fallback = PrecisionFallback(dirpath=directory, **options)
    run = fault_run(fault, fault_plugin(scaling), [fallback], steps=steps, blocks=blocks)
    return run.model.state_dict()


def loss_of(module: nn.Module) -> Callable[[Batch], Tensor]:
    """`TinyByteGPT._loss`, of a model in its wrappers."""

    def compute_loss(batch: Batch) -> Tensor:
        inputs, targets, weights = batch
        logits = module(inputs).float().transpose(1, 2)
        return (F.cross_entropy(logits, targets, reduction="none").mean(dim=1) * weights).mean()

    return compute_loss


def own_parts(
    fault: Fault | DataFault | None,
    scaling: str,
    directory: Path,
    kind: Own = "plain",
    more: dict[str, Any] | None = None,
    blocks: int = 2,
    **options: Any,
) -> tuple[TinyByteGPT, PrecisionLoop]:
    """A model, and the loop that trains it."""
    L.seed_everything(0, verbose=False)
    model = TinyByteGPT(blocks)
    configured: Any = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    module: Any = model
    more = dict(more or {})
    if kind == "fabric":
        fabric = L.Fabric(accelerator="cpu", devices=1)
        module, optimizer = fabric.setup(model, optimizer)
        more["fabric"] = fabric
    loop = PrecisionLoop(
        module,
        optimizer,
        scaling,
        layers={"*": scaling},
        base="32-true",
        scheduler=scheduler,
        clip_norm=1.0,
        fallback=options or True,
        monitor=False,
        dirpath=directory,
        **more,
    )
    if isinstance(fault, Fault):
        fault.install(model, loop)
    return model, loop


def batches(fault: Fault | DataFault | None, steps: int) -> Iterable[Batch]:
    """Those of `fault_run`."""
    text, _ = read_sources()
    data = fault if isinstance(fault, DataFault) else None
    return TinyBatches(text, batches=steps, seed=0, fault=data)


def in_own_loop(
    fault: Fault | DataFault | None,
    scaling: str,
    steps: int,
    directory: Path,
    kind: Own = "plain",
    **options: Any,
) -> dict[str, Tensor]:
    """Train, and give the weights."""
    model, loop = own_parts(fault, scaling, directory, kind, **options)
    compute_loss = loss_of(loop.model)
    for batch in batches(fault, steps):
        loop.step(compute_loss, batch)
    loop.close()
    state = model.state_dict()
    if isinstance(fault, Fault):
        fault.uninstall()
    return {name: x for name, x in state.items() if name in model.state_dict()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    shared = set(one) & set(other)
    return len(shared) > 10 and all(torch.equal(one[name], other[name]) for name in shared)
