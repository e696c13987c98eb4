"""What two real ranks with gloo run, for test_ranks.py."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_fp.loop import PrecisionLoop
from tests.helper import TinyGPT, next_byte_loss, text_rows
from tests.loop.faulty import told

STEPS = 14


def wrapped(kind: str, compiled: bool) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = TinyGPT(blocks=1)
    if compiled:
        for block in model.blocks:  # pyright: ignore
            block.compile()
    if kind == "fsdp":
        for block in model.blocks:  # pyright: ignore
            fully_shard(block)
        return fully_shard(model)
    return DistributedDataParallel(model, static_graph=kind == "static graph")


def train(directory: Path, kind: str, rank: int, *, compiled: bool) -> dict[str, object]:
    model = wrapped(kind, compiled)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loop = PrecisionLoop(
        model,
        optimizer,
        "delayed",
        base="32-true",
        clip_norm=1.0,
        monitor={"every_n_steps": 4, "log_every_n_steps": 4},
        fallback={"probe_every_n_steps": 4, "snapshot_every_n_steps": 4},
        dirpath=directory,
    )
    rows = text_rows(16 * STEPS)
    losses: list[float] = []
    # A static graph takes no `no_sync` before it is known, as torch has it.
    parts = 1 if kind == "static graph" else 2
    for step in range(STEPS):
        batch = rows[16 * step + 8 * rank :][:8]

        def compute(micro: Tensor, step: int = step) -> Tensor:
            loss = next_byte_loss(model, micro)
            # On one rank alone a gradient is not finite: both leave the step out.
            bad = step == 9 and rank == 1 and loop.global_step == 9
            return loss * float("nan") if bad else loss

        losses.append(float(loop.step(compute, list(batch.chunk(parts)))))
        if step == 4:
            loop.precision_map.set("*fc1", "fp8-dynamic")
    try:
        loop.mismatch.update(rows[:1].float(), rows[:1].float())
        refused = ""
    except ValueError as error:
        refused = str(error)
    loop.close()
    weights = [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()  # pyright: ignore
        for p in model.parameters()
    ]
    return {
        "weights": weights,
        "formats": loop.precision_map.formats(),
        "skipped": loop.steps.skipped,
        "told": told(directory) if rank == 0 else [],
        "confined": loop._parts.words().get("watch", ""),
        "losses": losses,
        "mismatch": refused,
    }


def main(directory: Path, compiled: bool) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    found = {
        kind: train(directory / kind, kind, rank, compiled=compiled)
        for kind in (("ddp",) if compiled else ("ddp", "static graph", "fsdp"))
    }
    torch.save(found, directory / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
