"""A model sharded over two real ranks by FSDP2, handed over and saved: test_shards.py."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import save
from torch.distributed.fsdp import fully_shard

from lightning_fp import convert
from lightning_fp.rl import Causes, SampleOrigin, quantised_state_dict
from lightning_fp.telemetry.mismatch.mismatch_tally import MismatchTally


def model(format: str) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(208, 304), nn.LayerNorm(304), nn.Linear(304, 208), nn.Linear(208, 32)
    converted = nn.Sequential(*layers)
    convert(converted, format, layers={"3": "bf16"})
    return converted


def causes_where_one_rank_knows(rank: int) -> Causes | None:
    """Rank 1 alone has stale samples, and knows it."""
    tally = MismatchTally("test", "verl", 2.0)
    tally.start(torch.device("cpu"))
    rollout = torch.full((2, 4), -1.0)
    if rank == 0:
        tally.add((rollout, rollout - 1e-3))
    else:
        origin = SampleOrigin(rollout_version=torch.tensor([1, 3]), train_version=3)
        tally.add((rollout, rollout - torch.tensor([[0.5], [1e-3]]), None, origin))
    tally.values(failed=False)
    return tally.causes


def main(directory: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    handed: dict[str, list[tuple[str, torch.Tensor, torch.Tensor | None]]] = {}
    for format in ("fp8-block", "fp8-dynamic", "fp8-rowwise"):
        sharded = model(format)
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for layer in sharded:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        handed[format] = list(quantised_state_dict(sharded))
        if format == "fp8-block":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = {"state_dict": sharded.state_dict()}
                save(state, checkpoint_id=str(directory / "sharded"))
    told = causes_where_one_rank_knows(rank)
    assert told is not None
    result = {"handed": handed, "causes": dict(told.share), "stale": told.stale_tokens}
    torch.save(result, directory / f"rank{rank}.pt")
    dist.destroy_process_group()
