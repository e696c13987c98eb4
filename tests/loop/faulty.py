"""The demo's faults in a plain loop, beside the Trainer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_fp import PrecisionFallback
from lightning_fp.demo.data import read_sources
from lightning_fp.demo.faults import fault_plugin, fault_run
from lightning_fp.demo.faults.base import Fault
from lightning_fp.demo.faults.innocent import DataFault
from lightning_fp.demo.faults.run import TinyBatches, TinyByteGPT
from lightning_fp.events import Demotion, Event, Verdict
from lightning_fp.loop import PrecisionLoop
from lightning_fp.records import read_events

TOLD = ("suspect", "verdict", "demote", "promote", "rollback", "skip", "climb", "rehearsal")
"""Kinds of events that must be the same in every loop."""


def told(directory: Path) -> list[tuple[int, str, str]]:
    """What was decided, and when, without times and bytes."""
    events = [event for event in read_events(directory) if event.kind in TOLD]
    return [(event.step, event.kind, _essence(event)) for event in events]


def _essence(event: Event) -> str:
    if isinstance(event, Demotion):
        return str(sorted(event.formats.items()))
    return event.reason if isinstance(event, Verdict) else ""


def in_the_trainer(
    fault: Fault | DataFault | None, scaling: str, steps: int, directory: Path, **options: Any
) -> dict[str, Tensor]:
    fallback = PrecisionFallback(dirpath=directory, **options)
    run = fault_run(fault, fault_plugin(scaling), [fallback], steps=steps)
    return run.model.state_dict()


def plain_parts(
    fault: Fault | DataFault | None, scaling: str, directory: Path, **options: Any
) -> tuple[TinyByteGPT, PrecisionLoop]:
    L.seed_everything(0, verbose=False)
    model = TinyByteGPT(2)
    configured: Any = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    loop = PrecisionLoop(
        model,
        optimizer,
        scaling,
        layers={"*": scaling},
        base="32-true",
        scheduler=scheduler,
        clip_norm=1.0,
        fallback=options or True,
        monitor=False,
        dirpath=directory,
    )
    if isinstance(fault, Fault):
        fault.install(model, loop)
    return model, loop


def in_a_plain_loop(
    fault: Fault | DataFault | None, scaling: str, steps: int, directory: Path, **options: Any
) -> dict[str, Tensor]:
    model, loop = plain_parts(fault, scaling, directory, **options)
    text, _ = read_sources()
    data = fault if isinstance(fault, DataFault) else None
    for batch in TinyBatches(text, batches=steps, seed=0, fault=data):
        loop.step(model._loss, batch)
    loop.close()
    state = model.state_dict()
    if isinstance(fault, Fault):
        fault.uninstall()
    return {name: x for name, x in state.items() if name in model.state_dict()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    shared = set(one) & set(other)
    return len(shared) > 10 and all(torch.equal(one[name], other[name]) for name in shared)
