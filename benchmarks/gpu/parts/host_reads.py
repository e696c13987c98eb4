"""Whether a step waits for the device: torch.cuda.set_sync_debug_mode("error") around it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from parts.card import Card
from parts.formats import OURS, converted, first_line
from parts.llama import compile_blocks, make_llama, make_step
from parts.rows import Rows

WARM_UP = 8
"""Steps after which delayed scales are there and warm."""


def measure(card: Card, rows: Rows) -> None:
    _watched(card, rows, "fp8-delayed, a layer that does not run", lambda: _one_left_out(card))
    _watched(card, rows, "fp8-delayed, a sampled step", lambda: _sampled(card))
    for compiled in (False,) if card.small else (False, True):
        for format in OURS[: 1 if card.small else None]:
            what = f"{format}, {'compiled' if compiled else 'eager'}"
            _watched(card, rows, what, lambda f=format, c=compiled: _training(card, f, c))


def _watched(card: Card, rows: Rows, what: str, make: Callable[[], Callable[[], object]]) -> None:
    try:
        step = make()
        for _ in range(2 if card.small else WARM_UP):
            step()
    except Exception as error:
        rows.add(what, None, note=f"does not run: {first_line(error)}")
        return
    try:
        with card.forbid_reads():
            step()
    except RuntimeError as error:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "parts" not in f.filename]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "here"
        rows.add(what, 1, "reads or more", note=f"waits in {place}: {first_line(error)}")
        return
    rows.add(what, 0, "reads", note="a step waits for nothing")


def _training(card: Card, format: str, compiled: bool) -> Callable[[], object]:
    model, shape = make_llama(card, 2)
    table = converted(model, format)
    if compiled:
        torch._dynamo.reset()
        compile_blocks(model, card)
    return make_step(model, shape, card, table)


def _one_left_out(card: Card) -> Callable[[], object]:
    layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)).to(card.device, card.dtype)
    table = converted(layers, "fp8-delayed")
    x = torch.randn(64, 64, device=card.device, dtype=card.dtype)

    def step() -> None:
        layers[2](layers[0](x)).sum().backward()
        table.step()

    return step


def _sampled(card: Card) -> Callable[[], object]:
    from lightning_fp.layers.statistics_table import StatisticsTable

    model, shape = make_llama(card, 2)
    table = converted(model, "fp8-delayed")
    collected = StatisticsTable(table.layers)
    plain = make_step(model, shape, card, table)

    def step() -> None:
        collected.collect(True)
        plain()
        collected.fold()
        collected.collect(False)

    return step
