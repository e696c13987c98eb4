"""Runs a test's program on two real ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import forked

WORLD = 2


def run_on_two_ranks(module: str, directory: Path, *arguments: Any, timeout: float = 240) -> None:
    """Run `main(directory, *arguments)` of a module in two processes, side by side.

    Each finds its rank in the environment, as under torchrun, and meets the other one by a file in
    the directory: ports may be taken. If one fails, its output is the error.
    """
    environment = {
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # Lightning asks for one, nobody listens on it
        "TORCHELASTIC_RUN_ID": "tests",  # so that Lightning starts no processes of its own
    }
    if Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    logs = [directory / f"log{rank}" for rank in range(WORLD)]
    ranks = [
        forked.start(
            module,
            directory,
            *arguments,
            log=log,
            environment={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]
    until = time.monotonic() + timeout
    try:
        for rank in ranks:
            rank.join(until - time.monotonic())
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    for rank, log in zip(ranks, logs, strict=True):
        assert rank.exitcode == 0, log.read_text()[-4000:]


@contextmanager
def one_of_two_ranks(directory: Path, *, seconds: float = 60) -> Generator[int, None, None]:
    """In such a program: this process's rank, in a gloo group with the other one.

    Args:
        directory: the one that `main` is called with.
        seconds: for which a collective waits.
    """
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=seconds),
    )
    yield rank
    dist.barrier()
    dist.destroy_process_group()
