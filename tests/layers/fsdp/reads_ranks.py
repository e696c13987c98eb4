"""Models that read their layers' weights themselves, on two real ranks: test_reads.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.parametrizations import weight_norm

from lightning_fp import PrecisionMap, convert
from lightning_fp.layers.switchable import Gathering
from tests.layers.fsdp.gather_ranks import Traffic
from tests.two_ranks import one_of_two_ranks

IN, HIDDEN, TOKENS, STEPS, BEGINS = 48, 80, 7, 5, 3
"""BEGINS: the step in which "later" begins to read."""


class Block(nn.Module):
    """Reads the weight of `up` in one of the ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, IN)
        self.how, self.step = how, 0
        self.penalty: Tensor | float = 0.0
        if how == "hook":
            self.up.register_forward_hook(lambda layer, _, y: y + layer.weight.mean())
        if how == "parametrized":
            weight_norm(self.up)
        if how == "DoRA":
            import peft

            config = peft.LoraConfig(r=4, use_dora=True, target_modules=["up"])
            peft.inject_adapter_in_model(config, self)

    def forward(self, x: Tensor) -> Tensor:
        weight, scale = self.up.weight, 1.0
        if self.how == "penalty" or (self.how == "later" and self.step >= BEGINS):
            self.penalty = 0.01 * weight.float().square().mean()
        if self.how == "on one rank" and dist.get_rank() == 1:
            self.penalty = 0.01 * weight.float().square().mean()
        if self.how == "norm without gradient":  # as DoRA's
            scale = 1 / weight.detach().norm(dim=1)
        if self.how == "dtype" and (weight.dtype, weight.shape) != (x.dtype, (HIDDEN, IN)):
            raise ValueError("another weight")
        return x + self.down(torch.relu(self.up(x)) * scale)


class Model(nn.Module):
    """Two blocks that are sharded by themselves; what is outside stays gathered until backward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(how) for _ in range(2))
        self.head = nn.Linear(IN, 64, bias=False)
        self.words = nn.Embedding(64, IN)
        self.how = how
        if how == "tied":
            self.words.weight = self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        words = self.head.weight if self.how == "tied by hand" else self.words.weight
        x = F.embedding(ids, words)
        self.embedded = x
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    if model.how == "second derivatives":
        output = model(ids).float()
        inside = model.embedded
        model.set_reshard_after_backward(False)  # FSDP2 would free what the second backward needs
        (gradient,) = torch.autograd.grad(output.square().mean(), inside, create_graph=True)
        model.set_reshard_after_backward(True)
        return output.square().mean() + gradient.square().sum()
    loss = model(ids).float().square().mean()
    if model.how == "after forward":
        loss = loss + 0.01 * model.head.weight.float().square().mean()
    if model.how == "all parameters after forward":
        whole = model.head.parameters()
        loss = loss + 0.01 * sum((p.float().square().mean() for p in whole), torch.zeros(()))
    if model.how == "dtype after forward" and model.head.weight.dtype != torch.bfloat16:
        raise ValueError("another weight")
    return loss + sum(block.penalty for block in model.blocks)


@dataclass
class Told:
    losses: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def build(how: str, all_gather: Gathering) -> tuple[Any, PrecisionMap]:
    torch.manual_seed(0)
    model: Any = Model(how)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        stays = how == "second derivatives"
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not stays)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    table = convert(model, "fp8-dynamic", layers={"*": "fp8-dynamic"}).precision_map
    table.phase.all_gather = all_gather
    return model, table


def train(how: str, all_gather: Gathering) -> Told:
    model, table = build(how, all_gather)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    told = Told()
    table.subscribe(lambda _: None, told.notes.append)
    for step in range(STEPS):
        table.before_batch()
        for block in model.blocks:
            block.step = step
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        ids = torch.randint(64, (TOKENS,), generator=generator)
        with Traffic(weights=1) as traffic:
            loss = loss_of(model, ids)
            loss.backward()
        told.losses.append(float(loss.detach()))
        told.bytes.append(traffic.bytes)
        optimizer.step()
        optimizer.zero_grad()
        table.step()
    return told


def main(directory: Path, ways: list[str]) -> None:
    gathers: list[Gathering] = ["auto", "high"]
    with one_of_two_ranks(directory, seconds=120) as rank:
        found = {how: {each: vars(train(how, each)) for each in gathers} for how in ways}
        torch.save(found, directory / f"rank{rank}.pt")
