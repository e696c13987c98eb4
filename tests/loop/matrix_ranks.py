"""Cells of the matrix of strategies on two real ranks: test_matrix.py."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_fp.loop import PrecisionLoop
from tests.helper import TinyGPT, next_byte_loss, text_rows
from tests.loop.strategy_ranks import STRATEGIES, whole
from tests.two_ranks import one_of_two_ranks

FORMATS = (
    "bf16",
    "fp8-dynamic",
    "fp8-delayed",
    "fp8-rowwise",
    "fp8-rowwise-gw-hp",
    "fp8-block",
    "mxfp8",
    "e4m3",
    "e4m3-scaled",
)
STEPS = 3


@dataclass(frozen=True, order=True)
class Cell:
    """One combination."""

    strategy: str
    compiled: bool
    format: str
    checkpointed: bool
    watched: bool


def cells() -> list[Cell]:
    """All there are."""
    both = (False, True)
    axes = itertools.product(STRATEGIES, both, FORMATS, both, both)
    return [Cell(*each) for each in axes]


class Checkpointed(TinyGPT):
    """Blocks compute their activations again in backward."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.lm_head(x)


def run(cell: Cell, directory: Path) -> dict[str, Any]:
    """A few steps; what refuses at setup says why."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = (Checkpointed if cell.checkpointed else TinyGPT)(blocks=1)
    wrapped = STRATEGIES[cell.strategy](model)
    if cell.compiled:
        for block in model.blocks:
            block.compile(backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    try:
        loop = PrecisionLoop(
            wrapped,
            optimizer,
            cell.format,
            layers={"*": cell.format},
            base="32-true",
            clip_norm=1.0,
            monitor={"every_n_steps": 2, "log_every_n_steps": 2} if cell.watched else False,
            fallback={"probe_every_n_steps": 2} if cell.watched else False,
            dirpath=directory if cell.watched else None,
        )
    except ValueError as error:
        return {"refused": str(error)}
    losses = [
        float(loop.step(lambda rows: next_byte_loss(wrapped, rows), batch))
        for batch in text_rows(4 * STEPS).split(4)
    ]
    watching = loop._parts.watching
    failed = watching is not None and watching.failed_at is not None
    weights = {name: whole(each) for name, each in model.named_parameters()}
    loop.close()
    return {"losses": losses, "weights": weights, "failed": failed, "refused": ""}


def main(directory: Path, asked: list[Cell]) -> None:
    with one_of_two_ranks(directory, seconds=60) as rank:
        found = [run(cell, directory / str(index)) for index, cell in enumerate(asked)]
        torch.save(found, directory / f"rank{rank}.pt")
