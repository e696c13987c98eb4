"""What two real ranks with gloo run, for test_by_chance.py."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lightning_fp.numerics import new_seed
from lightning_fp.numerics.simulated import random_bits
from tests.helper import TinyGPT, next_byte_loss, text_rows
from tests.loop.test_by_chance import SAVED, STEPS, own_loop, weights


def train(directory: Path, rank: int, *, interrupted: bool) -> dict[str, torch.Tensor]:
    """To the end; if interrupted, all ranks go on from what the first one has saved."""

    def model_of() -> DistributedDataParallel:
        torch.manual_seed(0)
        return DistributedDataParallel(TinyGPT(blocks=1))

    torch.manual_seed(5)
    model = model_of()
    loop = own_loop(model)
    rows = text_rows(16 * STEPS)
    for step in range(STEPS):
        if interrupted and step == SAVED:
            path = directory / "saved.pt"
            parts = {"model": model, "optimizer": loop.optimizer, "loop": loop}
            if rank == 0:
                torch.save({name: part.state_dict() for name, part in parts.items()}, path)
            dist.barrier()
            loop.close()
            torch.manual_seed(77 + rank)
            model = model_of()
            loop = own_loop(model)
            saved = torch.load(path, weights_only=True)
            for name, part in {"model": model, "optimizer": loop.optimizer, "loop": loop}.items():
                part.load_state_dict(saved[name])
        batch = rows[16 * step + 8 * rank :][:8]
        loop.step(lambda batch, model=model: next_byte_loss(model, batch), batch)
    loop.close()
    return weights(model)


def main(directory: Path) -> None:
    rank = int(os.environ["RANK"])
    meeting = directory / "meeting"
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(1)
    noise = random_bits(new_seed(torch.device("cpu")), torch.Size([1_000_000]))
    torch.save(noise, directory / f"noise{rank}.pt")
    for name in ("whole", "resumed"):
        result = train(directory, rank, interrupted=name == "resumed")
        torch.save(result, directory / f"{name}{rank}.pt")
    dist.destroy_process_group()
