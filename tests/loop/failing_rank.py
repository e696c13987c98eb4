"""What two real ranks with gloo run: on one of them a part of the watch fails (test_ranks.py)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lightning_fp.loop import PrecisionLoop
from lightning_fp.stability.happenings import Asked
from lightning_fp.stability.supervise.supervisor import Supervisor
from tests.helper import TinyGPT, next_byte_loss, text_rows

STEPS = 8
FAILS = 4


def raises(*_: Any, **__: Any) -> None:
    raise MemoryError("no memory for this batch")


def train(directory: Path, part: str, rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = DistributedDataParallel(TinyGPT(blocks=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fallback = {"probe_every_n_steps": None, "snapshot_every_n_steps": 2}
    loop = PrecisionLoop(
        model,
        optimizer,
        "dynamic",
        layers={"*": "fp8-dynamic"},
        base="32-true",
        fallback=fallback,
        monitor=False,
        dirpath=directory,
    )
    rows = text_rows(8 * STEPS)
    for step in range(STEPS):
        watching = watching_of(loop)
        if step == FAILS and watching is not None:
            if rank == 1:
                broken = {"ring": watching.ring, "snapshots": watching.snapshots}[part]
                setattr(broken, {"ring": "add", "snapshots": "take"}[part], raises)
            if part == "ring":  # a case is opened before the others can have heard of it
                ask_after_batch(watching)
        batch = rows[8 * step + 4 * rank :][:4]
        loop.step(lambda micro: next_byte_loss(model, micro), batch)
    watching = watching_of(loop)
    assert watching is not None
    failed = watching.failed_at
    loop.close()
    return {"failed": failed, "weights": [p.detach().clone() for p in model.parameters()]}


def watching_of(loop: PrecisionLoop) -> Supervisor | None:
    return loop._parts.watching


def ask_after_batch(watching: Supervisor) -> None:
    """At the next boundary something is suspicious, alike on both ranks."""
    take = watching._arrivals.take

    def asked(step: int) -> Any:
        watching._arrivals.take = take  # type: ignore[method-assign]
        yield Asked(at=step, onset=step - 2)

    watching._arrivals.take = asked  # type: ignore[method-assign]


def main(directory: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    found = {part: train(directory / part, part, rank) for part in ("ring", "snapshots")}
    torch.save(found, directory / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
