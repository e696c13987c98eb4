"""Some of the ranks train, the others do something else: test_group.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_fp.loop import PrecisionLoop
from tests.helper import TinyGPT, next_byte_loss, text_rows
from tests.loop.faulty import told
from tests.two_ranks import one_of_two_ranks

WORLD, TRAIN = 3, (1, 2)
STEPS, BATCH = 10, 4
RECIPE = """
name: by-tokens
stages:
  - name: high
    layers: {"*": high}
    until: {tokens: 200}
  - name: low
    layers: {"*": configured}
"""


def train(directory: Path, group: Any = None) -> dict[str, Any]:
    """A run with all that meets over ranks; the same batches on each."""
    torch.manual_seed(0)
    model = TinyGPT(blocks=1)
    wrapped: nn.Module = model
    if group is not None:
        wrapped = DistributedDataParallel(model, process_group=group)
    loop = PrecisionLoop(
        wrapped,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        "delayed",
        base="32-true",
        group=group,
        fallback={"snapshot_every_n_steps": 4, "probe_every_n_steps": 4},
        monitor={"every_n_steps": 3, "log_every_n_steps": 3},
        recipe=RECIPE,
        parity={"every_n_steps": 4},
        stability={"log_every_n_steps": 3},
        mismatch={"every_n_steps": 2},
        log_every_n_steps=3,
        dirpath=directory,
    )
    found: dict[str, Any] = {"losses": [], "formats": []}
    for batch in text_rows(BATCH * STEPS).split(BATCH):
        found["losses"].append(float(loop.step(lambda rows: next_byte_loss(wrapped, rows), batch)))
        found["formats"].append(loop.precision_map.formats())
        logprobs = -batch[:, :4].float() / 256
        loop.mismatch.update(logprobs, 1.01 * logprobs)
    with loop.as_trained():
        found["evaluated"] = float(next_byte_loss(wrapped, batch).detach())
    writes = loop.directory is not None
    loop.close()
    return {
        **found,
        "weights": {name: each.detach().clone() for name, each in model.named_parameters()},
        "parity": sorted(loop.parity),
        "told": told(directory) if writes else [],
        "writes": writes,
    }


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def main(directory: Path) -> None:
    with one_of_two_ranks(directory) as rank:
        group: Any = dist.new_group(list(TRAIN))
        found: dict[str, Any] = {}
        if rank in TRAIN:
            found = train(directory / "run", group)
        else:
            model = nn.Linear(4, 4)
            try:
                PrecisionLoop(model, torch.optim.SGD(model.parameters()), group=group)
            except ValueError as error:
                found = {"refused": str(error)}
        torch.save(found, directory / f"rank{rank}.pt")
