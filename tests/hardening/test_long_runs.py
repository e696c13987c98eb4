"""Long runs: memory, objects, graphs and open files stay what they are early on."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_fp import (
    ClampMonitor,
    FP8Precision,
    LossRecorder,
    ParityProbe,
    PrecisionFallback,
    StabilityMonitor,
    StagedRollout,
)
from lightning_fp.loop import PrecisionLoop
from lightning_fp.records import read_events, read_steps
from tests.helper import make_trainer

needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")


@dataclass(frozen=True)
class Held:
    """What the process holds."""

    resident: int
    """Bytes of memory."""
    objects: int
    """That Python's garbage collector knows."""
    tensors: int
    files: int
    graphs: int
    """That dynamo has compiled."""


def held() -> Held:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    objects = gc.get_objects()
    return Held(
        resident=pages * os.sysconf("SC_PAGE_SIZE"),
        objects=len(objects),
        tensors=sum(issubclass(type(each), Tensor) for each in objects),
        files=len(os.listdir("/proc/self/fd")),
        graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"],
    )


def check(early: Held, late: Held, steps: int) -> None:
    """A growth of one small thing per step would be found: a float, a tensor, a file."""
    assert late.files <= early.files
    assert late.graphs <= early.graphs
    assert late.tensors - early.tensors <= steps // 10 + 20
    assert late.objects - early.objects <= steps // 10 + 300
    assert late.resident - early.resident <= max(8 * 2**20, 128 * steps)


SOON_FULL = {"snapshots": 2, "snapshot_every_n_steps": 4}
"""Of the fallback: no snapshot, and so no recorded batch, is ever more than 64 steps old."""


class Rows(IterableDataset):
    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(16, generator=generator)


class Tiny(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = torch.compile(
            nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), backend="eager"
        )

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return (self.model(batch) - batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Looks(L.Callback):
    """In the middle, when all that is made once has been made, and at the end."""

    def __init__(self, steps: int) -> None:
        self.at = (steps // 2, steps)
        self.seen: list[Held] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.at:
            self.seen.append(held())


def in_a_trainer(steps: int, directory: Path) -> None:
    looks = Looks(steps)
    callbacks = [
        ClampMonitor(dirpath=directory),
        PrecisionFallback(**SOON_FULL),
        StagedRollout("aggressive"),
        ParityProbe(every_n_steps=100),
        StabilityMonitor(),
        LossRecorder(),
        looks,
    ]
    trainer = make_trainer(FP8Precision("delayed"), callbacks=callbacks, max_steps=steps)
    trainer.fit(Tiny(), DataLoader(Rows(), batch_size=4))
    check(*looks.seen, steps // 2)
    assert read_steps(directory).num_rows == steps
    assert len(read_events(directory)) < 100


def in_a_plain_loop(steps: int, directory: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen: list[Held] = []
    rows = iter(Rows())
    with PrecisionLoop(
        model,
        optimizer,
        "delayed",
        dirpath=directory,
        progress=False,
        recipe="aggressive",
        fallback=SOON_FULL,
    ) as own:
        for step in range(steps):
            batch = torch.stack([next(rows) for _ in range(4)])
            own.step(lambda batch: (model(batch) - batch).square().mean(), batch)
            if step + 1 in (steps // 2, steps):
                seen.append(held())
    check(*seen, steps // 2)
    assert read_steps(directory).num_rows == steps


RUNS = pytest.mark.parametrize("run", [in_a_trainer, in_a_plain_loop])


@needs_proc
def test_hundreds_of_steps(tmp_path: Path) -> None:
    in_a_plain_loop(300, tmp_path)


@needs_proc
@pytest.mark.slow
@RUNS
def test_a_thousand_steps(run: Any, tmp_path: Path) -> None:
    run(1000, tmp_path)


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(1200)
@RUNS
def test_twenty_thousand_steps(run: Any, tmp_path: Path) -> None:
    run(20_000, tmp_path)
