"""Runs a test's program on two real ranks, or a few more."""

from __future__ import annotations

import os
import signal
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
    codes = run_on_ranks(WORLD, module, directory, *arguments, timeout=timeout)
    for rank, code in enumerate(codes):
        how = f"not done after {timeout} s" if code == -signal.SIGKILL else f"exit code {code}"
        printed = (directory / f"log{rank}").read_text()[-4000:]
        assert code == 0, f"rank {rank}: {how}\n{printed}"


def run_on_ranks(
    world: int, module: str, directory: Path, *arguments: Any, timeout: float = 240
) -> list[int | None]:
    """The same on so many ranks, which may fail.

    Returns:
        Their exit codes; what they print is in files `log0`, `log1`, ... of the directory.
    """
    environment = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # Lightning asks for one, nobody listens on it
        "TORCHELASTIC_RUN_ID": "tests",  # so that Lightning starts no processes of its own
    }
    if Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    (directory / "store").unlink(missing_ok=True)  # where those of an earlier run have met
    ranks = [
        forked.start(
            module,
            directory,
            *arguments,
            log=directory / f"log{rank}",
            environment={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    until = time.monotonic() + timeout
    try:
        for rank in ranks:
            rank.join(until - time.monotonic())
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return [rank.exitcode for rank in ranks]


@contextmanager
def one_of_two_ranks(directory: Path, *, seconds: float = 60) -> Generator[int, None, None]:
    """In such a program: this process's rank, in a gloo group with the others.

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
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=seconds),
    )
    yield rank
    dist.barrier()
    dist.destroy_process_group()
