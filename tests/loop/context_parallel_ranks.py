"""Two ranks with half of each text, for test_context_parallel.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.nn.parallel import DistributedDataParallel

from lightning_fp.loop import PrecisionLoop
from tests.helper import CONTEXT, text_rows
from tests.two_ranks import one_of_two_ranks

WIDTH, BATCH, STEPS = 32, 4, 5


class Attention(nn.Module):
    """Each rank asks for its part of the text, and hears of keys and values of all."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k, v = everywhere(k), everywhere(v)
        first = k.shape[1] // ranks() * rank()
        later = torch.arange(k.shape[1]) > first + torch.arange(q.shape[1]).unsqueeze(1)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=~later))


class Model(nn.Module):
    """The next byte from all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.attention, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(places)
        x = x + self.attention(self.norm(x))
        return self.head(x + self.down(F.gelu(self.up(x))))


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def everywhere(part: Tensor) -> Tensor:
    """[batch, time of a rank, width] of all ranks, one after the other in time."""
    if ranks() == 1:
        return part
    return all_gather_tensor_autograd(
        part.contiguous(), gather_dim=1, group=dist.distributed_c10d._get_default_group()
    )


def own(row: Tensor) -> Tensor:
    """This rank's part of [batch, time]."""
    return row.chunk(ranks(), dim=1)[rank()]


def train(directory: Path) -> dict[str, Any]:
    """A watched run; the losses are those of the whole text."""
    torch.manual_seed(0)
    model = Model()
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    loop = PrecisionLoop(
        wrapped,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        "delayed",
        layers={"*head": "high", "*": "fp8-delayed"},
        base="32-true",
        monitor={"every_n_steps": 2, "log_every_n_steps": 4},
        fallback={"snapshot_every_n_steps": 2},
        dirpath=directory,
    )

    def loss_of(batch: Tensor) -> Tensor:
        places = torch.arange(CONTEXT).expand(len(batch), -1)
        logits = loop.model(own(batch[:, :-1]), own(places))
        return F.cross_entropy(logits.flatten(0, 1), own(batch[:, 1:]).flatten())

    losses = [loop.step(loss_of, batch) for batch in text_rows(BATCH * STEPS).split(BATCH)]
    scales = loop.precision_map.scale_history.amax.clone()
    loop.close()
    whole = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(whole)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return {"losses": (whole / ranks()).tolist(), "amax": scales, "weights": weights}


def main(directory: Path) -> None:
    with one_of_two_ranks(directory) as rank:
        torch.save(train(directory / "run"), directory / f"rank{rank}.pt")
