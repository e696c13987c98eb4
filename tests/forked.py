"""Processes for tests, forked from one that has imported what they need.

To import it anew in each would take longer than most of what they run.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["lightning.pytorch", "torchao.float8", "torch._dynamo", "pyarrow.parquet"]
)


def start(
    module: str, *arguments: Any, log: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Run `main(*arguments)` of a module in a process of its own.

    Args:
        module: its name.
        arguments: as multiprocessing can send them.
        log: takes what the process prints.
        environment: variables that it finds set.

    Returns:
        The process, running.
    """
    process = _CONTEXT.Process(target=_run, args=(module, arguments, log, environment or {}))
    process.start()
    return process


def _run(
    module: str, arguments: tuple[Any, ...], log: Path, environment: Mapping[str, str]
) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    importlib.import_module(module).main(*arguments)
