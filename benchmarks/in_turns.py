"""Trainings that take turns, step by step: what the machine does meanwhile hits all alike.

Each has a process of its own, with a heap of its own, as a training has. All of a group are on one
core; several groups, in turned orders, run at a time, one on each core.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import lightning as L
import torch

T = TypeVar("T")


class Steps(L.Callback):
    """Processor time of each step, the whole loop and all callbacks included, from `skip` on."""

    def __init__(self, turns: Connection, skip: int) -> None:
        self.turns, self.skip = turns, skip
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.precision_plugin.precision_map.frozen:  # a probe runs a step again, hooks too
            return
        if trainer.global_step > self.skip:
            self.seconds.append(time.process_time() - self._began)
        self.turns.send(None)
        self.turns.recv()
        self._began = time.process_time()


@dataclass(frozen=True)
class _Ended(Generic[T]):
    result: T


def in_turns(arms: Sequence[Callable[[Connection], T]], groups: int) -> list[list[T]]:
    """Run all arms in turns, in several groups.

    Args:
        arms: each trains with a `Steps` over the connection, and returns what it measured; it is
            sent to a process, so it is a function of a module, or a partial of one.
        groups: how often; each has the arms in another order.

    Returns:
        By group, the results in the order of `arms`.
    """
    with ThreadPoolExecutor(os.cpu_count()) as cores:
        return list(cores.map(lambda group: _one_group(arms, group), range(groups)))


def _one_group(arms: Sequence[Callable[[Connection], T]], group: int) -> list[T]:
    processes = get_context("spawn")
    cores = os.cpu_count() or 1
    first = group // cores % len(arms)  # the groups that run at a time have the same order
    running: dict[int, Connection] = {}
    ended: dict[int, T] = {}
    for arm in [*range(first, len(arms)), *range(first)]:
        running[arm], theirs = processes.Pipe()
        processes.Process(target=_run, args=(arms[arm], theirs, group)).start()
        theirs.close()  # so that the end of the process is noticed
    while running:
        for arm, turns in list(running.items()):
            turns.send(None)
            if isinstance(said := turns.recv(), _Ended):
                ended[arm] = said.result
                del running[arm]
    return [ended[arm] for arm in range(len(arms))]


def _run(arm: Callable[[Connection], Any], turns: Connection, group: int) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[group % len(cores)]})
    turns.recv()
    turns.send(_Ended(arm(turns)))


def blocks(steps: Sequence[float], length: int) -> list[float]:
    """The seconds of each block of steps together."""
    return [sum(steps[i : i + length]) for i in range(0, len(steps), length)]
