"""Runs a test's program on two real ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

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
