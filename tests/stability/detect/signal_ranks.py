"""Signals of two real ranks with gloo: test_signals.py."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from lightning_fp.stability.detect.signals import SignalQueue, StepSignals
from tests.two_ranks import one_of_two_ranks

NAN, INF = float("nan"), float("inf")

CASES: dict[str, tuple[dict[str, list[float] | None], dict[str, list[float] | None]]] = {
    "plain": (
        {"loss": [2.0], "norms": [1.0], "skipped": [0], "headroom": [1.5, -2.0]},
        {"loss": [3.0], "norms": [5.0], "skipped": [0], "headroom": [0.0]},
    ),
    "a rank without a loss": ({"loss": [2.0], "norms": [1.0]}, {"loss": None, "norms": [2.0]}),
    "no loss at all": ({"loss": None, "norms": [1.0]}, {"loss": None, "norms": [2.0]}),
    "NaN on one rank": ({"loss": [2.0], "norms": [1.0]}, {"loss": [NAN], "norms": [NAN]}),
    "inf on one rank": ({"loss": [INF], "norms": [INF]}, {"loss": [2.0], "norms": [1.0]}),
    "skipped on one rank": (
        {"loss": [2.0], "norms": [1.0], "skipped": [0, 1]},
        {"loss": [2.0], "norms": [1.0], "skipped": [0, 0]},
    ),
    "two optimizers": ({"norms": [3.0, 4.0]}, {"norms": [6.0, 0.0]}),
    "a rank that did not step": ({"norms": [0.25]}, {"norms": []}),
    "nobody stepped": ({"loss": [1.0]}, {"loss": [1.0]}),
    "headroom on one rank": ({"headroom": [3.0]}, {"headroom": None}),
}
"""By name, what rank 0 and rank 1 put in."""


def put(queue: SignalQueue, step: int, case: dict[str, list[float] | None], device: str) -> None:
    def tensors(name: str) -> list[Tensor]:
        return [torch.tensor(value, device=device) for value in case.get(name) or []]

    loss, headroom = tensors("loss"), tensors("headroom")
    queue.put(
        step,
        loss=loss[0] if loss else None,
        grad_norms=tensors("norms"),
        skipped=[value.bool() for value in tensors("skipped")],
        headroom=torch.stack(headroom).view(-1, 1) if headroom else None,
        lr=1e-3,
        device=torch.device(device),
    )


def main(directory: Path) -> None:
    with one_of_two_ranks(directory) as rank:
        queue = SignalQueue()
        for step, case in enumerate(CASES.values()):
            put(queue, step, case[rank], "cpu")
        seen: list[StepSignals] = queue.take()
        torch.save([asdict(signals) for signals in seen], directory / f"rank{rank}.pt")
