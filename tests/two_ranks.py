"""Runs a test's program on two real ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_on_two_ranks(module: str, directory: Path, *, timeout: float = 240) -> None:
    """Run `python -m module directory` twice, side by side, and fail with its output if it fails.

    The program finds its rank in the environment, as under torchrun, and meets the other one by a
    file in the directory: ports may be taken.
    """
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",  # Lightning asks for one, nobody listens on it
            "TORCHELASTIC_RUN_ID": "tests",  # so that Lightning starts no processes of its own
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        if Path("/sys/class/net/lo").exists():
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        with (directory / f"log{rank}").open("w") as log:
            command = [sys.executable, "-m", module, str(directory), str(rank)]
            processes.append(
                subprocess.Popen(
                    command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
                )
            )
    try:
        for process in processes:
            process.wait(timeout)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, (directory / f"log{rank}").read_text()[-4000:]
