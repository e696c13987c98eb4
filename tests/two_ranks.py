"""Runs a test's program on two real ranks.

The processes are forked from one that has imported what they all need: to import it anew for every
rank of every test would take longer than most of what they run.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORLD = 2

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lightning.pytorch", "torchao.float8", "pyarrow.parquet"])


def run_on_two_ranks(module: str, directory: Path, *arguments: Any, timeout: float = 240) -> None:
    """Run `main(directory, *arguments)` of a module in two processes, side by side.

    Each finds its rank in the environment, as under torchrun, and meets the other one by a file in
    the directory: ports may be taken. If one fails, its output is the error.
    """
    ranks = [
        _CONTEXT.Process(target=_run, args=(rank, module, directory, arguments))
        for rank in range(WORLD)
    ]
    for rank in ranks:
        rank.start()
    until = time.monotonic() + timeout
    try:
        for rank in ranks:
            rank.join(until - time.monotonic())
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    for rank, process in enumerate(ranks):
        assert process.exitcode == 0, (directory / f"log{rank}").read_text()[-4000:]


def _run(rank: int, module: str, directory: Path, arguments: tuple[Any, ...]) -> None:
    with (directory / f"log{rank}").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # Lightning asks for one, nobody listens on it
        "TORCHELASTIC_RUN_ID": "tests",  # so that Lightning starts no processes of its own
    }
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    importlib.import_module(module).main(directory, *arguments)
