"""Tries: a case, an arm that has to cope with it, a seed, and what came of it."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L

from benchmarks.proof.arms import Arm, protection
from benchmarks.proof.cases import CASES, Case
from benchmarks.proof.nets import Batches, Net
from benchmarks.proof.plain import in_a_plain_loop
from lightning_fp import FP8Precision, PrecisionFallback
from lightning_fp.demo.faults import fault_run
from lightning_fp.layers import PrecisionMap
from lightning_fp.records import read_events
from lightning_fp.records.events import FormatChange, Rollback, SkippedStep

Loop = Literal["trainer", "plain"]

LAST_STEPS = 30
"""Steps that the loss at the end is averaged over."""


@dataclass(frozen=True, kw_only=True)
class Try:
    """One run, and what the arm did in it."""

    case: str
    arm: Arm
    seed: int

    final_loss: float
    """Mean training loss over the last steps; NaN if one was not finite, or with two ranks."""

    changed: dict[str, str]
    """The layers whose format was changed, with the format at the end."""

    first_change: int | None
    """The batch before which the first was."""

    kept: float
    """Share of the layers' steps that were in the format asked for."""

    skipped: int
    rolled_back: int
    replayed: int
    seconds: float
    """Processor time."""

    loop: Loop = "trainer"
    """What has trained."""

    def gap(self, high: Try) -> float:
        """By what share the final loss is higher than another run's; inf if it is not finite."""
        gap = self.final_loss / high.final_loss - 1
        return gap if math.isfinite(gap) else math.inf


class _Losses(L.Callback):
    """Every batch's loss, and how many layers are still in the format asked for."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.kept: list[float] = []
        self.changed_at: int | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        plugin = trainer.precision_plugin
        table = plugin.precision_map if isinstance(plugin, FP8Precision) else None
        self.step(float(outputs["loss"]), table)

    def step(self, loss: float, table: PrecisionMap | None) -> None:
        """A batch has been trained on."""
        self.losses.append(loss)
        if table is not None:
            formats = table.formats()
            self.first = getattr(self, "first", formats)
            same = [formats[name] == format for name, format in self.first.items()]
            self.kept.append(sum(same) / len(same))
            if self.changed_at is None and not all(same):
                self.changed_at = len(self.losses) - 1


def attempt(
    name: str, arm: Arm, seed: int, directory: Path | None = None, loop: Loop = "trainer"
) -> Try:
    """Run one.

    Args:
        name: of the case.
        arm: what protects it.
        seed: of weights and batches.
        directory: where the records of the run go, to be read afterwards; by default nowhere.
        loop: what trains; in a plain loop there are the fallback alone, and none.
    """
    case = CASES[name]
    began = time.process_time()
    L.seed_everything(seed, verbose=False)
    losses = _Losses()
    with tempfile.TemporaryDirectory() as passing:
        records = Path(passing) if directory is None else directory
        callbacks = protection(arm, records) if loop == "trainer" else []
        plugin = None
        if arm != "high precision":
            plugin = FP8Precision(case.scaling, base="32-true", layers={"*": case.scaling})
        replayed = 0
        if loop == "plain":
            replayed = in_a_plain_loop(case, seed, losses.step, records, fallback=arm == "fallback")
        elif case.net is None:
            fault_run(case.make(), plugin, [*callbacks, losses], seed=seed)
        else:
            _train(case, case.net(seed, case.rate), plugin, [*callbacks, losses], seed)
        there = (records / "events.jsonl").exists()
        events = list(read_events(records)) if there else []
    changes = [event for event in events if isinstance(event, FormatChange)]
    changed = {layer: after for event in changes for layer, (_, after) in event.formats.items()}
    fallback = next((c for c in callbacks if isinstance(c, PrecisionFallback)), None)
    last = losses.losses[-LAST_STEPS:]
    return Try(
        case=name,
        arm=arm,
        seed=seed,
        final_loss=sum(last) / len(last) if last else math.nan,
        changed=changed,
        first_change=losses.changed_at,
        kept=sum(losses.kept) / len(losses.kept) if losses.kept else 0.0,
        skipped=sum(isinstance(event, SkippedStep) for event in events),
        rolled_back=sum(e.step - e.to_step for e in events if isinstance(e, Rollback)),
        replayed=replayed if fallback is None else fallback.steps.replayed,
        seconds=round(time.process_time() - began, 2),
        loop=loop,
    )


def _train(
    case: Case, net: Net, plugin: FP8Precision | None, callbacks: list[L.Callback], seed: int
) -> None:
    fault = case.make()
    if fault is not None:
        fault.seed = seed
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "precision": "32-true" if plugin is None else None,
        "plugins": plugin,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **case.options,
    }
    trainer = L.Trainer(**options, callbacks=[*([] if fault is None else [fault]), *callbacks])
    batches = net.batches(case.steps, seed)
    spoiled = Batches(batches, fault.spoil) if hasattr(fault, "spoil") else Batches(batches)
    trainer.fit(net, spoiled)
