"""Training a Llama-like model of 1B parameters: tokens per second and memory, by format."""

from __future__ import annotations

import torch

from parts import prediction
from parts.card import Card
from parts.formats import BF16, alternatives, converted, first_line
from parts.llama import compile_blocks, make_llama, make_step
from parts.rows import Rows

BATCHES = (4, 2, 1)
"""Sequences of 2048 tokens; the first that BF16 has room for is taken for all."""


def measure(card: Card, rows: Rows) -> None:
    """BF16 first, then FP8 at the same batch; compiled before eager."""
    wanted = {BF16: (BF16, "auto"), **alternatives(card)}
    batch = _largest_batch(card)
    for compiled in (True, False):
        bf16 = None
        for name, (format, backend) in wanted.items():
            what = f"{name}, {'compiled' if compiled else 'eager'}"
            try:
                speed, peak = _train(card, format, backend, compiled, batch)
            except Exception as error:
                rows.add(what, None, note=f"batch {batch}: {first_line(error)}")
                continue
            bf16 = speed if name == BF16 else bf16
            note = f"at most {peak / 2**30:.2f} GiB, batch {batch}; ratio to BF16"
            rows.add(what, speed, "tokens/s", ratio=bf16 and speed / bf16, note=note)
            if compiled and name != BF16 and bf16:
                predicted = _predicted(card, format, backend, batch)
                prediction.add(card, rows, what, predicted, speed / bf16)


def _largest_batch(card: Card) -> int:
    for batch in BATCHES[:-1]:
        try:
            _train(card, BF16, "auto", False, batch)
            return batch
        except torch.cuda.OutOfMemoryError:
            continue
    return BATCHES[-1]


def _predicted(card: Card, format: str, backend: str, batch: int) -> float:
    model, shape = make_llama(card)
    tokens = torch.zeros(batch, shape.context, dtype=torch.long, device=card.device)
    return prediction.of_step(card, model, format, backend, tokens)


def _train(
    card: Card, format: str, backend: str, compiled: bool, batch: int
) -> tuple[float, float]:
    """Tokens per second, and bytes at most."""
    torch._dynamo.reset()
    card.forget_peak()
    model, shape = make_llama(card)
    table = None if format == BF16 else converted(model, format, backend)
    if compiled:
        compile_blocks(model, card)
    step = make_step(model, shape, card, table, batch=batch)
    seconds = card.medians({"step": step}, seconds=2.0)["step"]
    return batch * shape.context / seconds, card.peak_bytes()
