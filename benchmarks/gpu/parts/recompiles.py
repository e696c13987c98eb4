"""What compiling costs: the first step, a layer's change of format, the way back, a resume."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch._dynamo.utils import counters

from parts.card import Card
from parts.formats import converted, first_line
from parts.llama import compile_blocks, make_llama, make_step
from parts.rows import NotHereError, Rows


def measure(card: Card, rows: Rows) -> None:
    # Other parts have compiled the same blocks, and a cached compilation costs nothing.
    torch._inductor.config.force_disable_caches = True
    _check_compiles(card)
    for format in ("fp8-dynamic",) if card.small else ("fp8-dynamic", "fp8-delayed"):
        torch._dynamo.reset()
        model, shape = make_llama(card, 4)
        table = converted(model, format)
        compile_blocks(model, card)
        step = make_step(model, shape, card, table)
        for turn in range(1, 6):
            _timed(card, rows, f"{format}: step {turn}", step)
        table.set("blocks.1.down", "bf16")
        table.apply()
        _timed(card, rows, f"{format}: after one layer has gone to bf16", step)
        table.set("blocks.1.down", format)
        table.apply()
        _timed(card, rows, f"{format}: after it has come back", step)

        again, _ = make_llama(card, 4)
        resumed = converted(again, format)
        compile_blocks(again, card)
        again.load_state_dict(model.state_dict())
        resumed.load_state_dict(table.state_dict())
        step = make_step(again, shape, card, resumed)
        _timed(card, rows, f"{format}: first step after a resume in the same process", step)


def _check_compiles(card: Card) -> None:
    """A machine without a compiler for the host compiles nothing, which is no fault to report."""
    layer = nn.Linear(16, 16, device=card.device, dtype=card.dtype)
    card.compile(layer)
    try:
        layer(torch.ones(16, 16, device=card.device, dtype=card.dtype)).sum().backward()
    except Exception as error:
        raise NotHereError(f"nothing compiles here: {first_line(error)}") from error


def _timed(card: Card, rows: Rows, what: str, step: Callable[[], object]) -> None:
    before = counters["stats"]["unique_graphs"]
    card.synchronize()
    began = time.perf_counter()
    step()
    card.synchronize()
    seconds = time.perf_counter() - began
    graphs = counters["stats"]["unique_graphs"] - before
    rows.add(what, seconds, "s", note=f"{graphs} graphs compiled")
