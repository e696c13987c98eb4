"""Last-known-good states: how fast one is taken and put back."""

from __future__ import annotations

import time

from torch import Tensor
from torch.optim import AdamW, Optimizer

from parts.card import Card
from parts.llama import make_llama
from parts.rows import Rows


def measure(card: Card, rows: Rows) -> None:
    from lightning_fp.stability.keep.host_memory import wait_for_copies
    from lightning_fp.stability.keep.snapshot import LiveState, restore

    model, _ = make_llama(card, 8)
    optimizer = AdamW(model.parameters(), lr=0.0)
    _first_step(optimizer)
    parts = {"model": model, "optimizer": optimizer}
    began = time.perf_counter()
    snapshot = LiveState(parts).store(0)
    wait_for_copies()
    card.synchronize()
    _rate(rows, "the first, its memory pinned", snapshot.nbytes, began)
    for turn in range(2):
        began = time.perf_counter()
        snapshot = LiveState(parts).store(1, reuse=snapshot.drop())
        held = time.perf_counter() - began
        wait_for_copies()
        card.synchronize()
        _rate(rows, f"take, turn {turn + 1}", snapshot.nbytes, began)
        rows.add(f"take: how long it holds the host, turn {turn + 1}", held * 1e3, "ms")
        began = time.perf_counter()
        restore(snapshot, parts)
        card.synchronize()
        _rate(rows, f"restore, turn {turn + 1}", snapshot.nbytes, began)


def _first_step(optimizer: Optimizer) -> None:
    """The optimizer's state comes into being; no weight moves at a rate of 0 without decay."""
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = Tensor.zero_(parameter.detach().clone())
    optimizer.step()
    optimizer.zero_grad()


def _rate(rows: Rows, what: str, nbytes: int, began: float) -> None:
    seconds = time.perf_counter() - began
    note = f"{nbytes / 2**30:.3f} GiB in {seconds:.3f} s"
    rows.add(what, nbytes / 1e9 / seconds, "GB/s", note=note)
