"""Products and layers of Llama's shapes: BF16, torchao, each of our formats; eager and compiled.

The products alone are the bound: no layer can gain more. Layers are measured forward and backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from parts import prediction
from parts.card import Card
from parts.formats import BF16, alternatives, converted, first_line
from parts.rows import Rows

SHAPES = {
    "8B gate and up": (4096, 28672),
    "8B down": (14336, 4096),
    "8B qkv": (4096, 6144),
    "1B gate and up": (2048, 16384),
}
"""(in_features, out_features)."""

TOKENS = 8192


def measure(card: Card, rows: Rows) -> None:
    shapes = {"small": (32, 64)} if card.small else SHAPES
    tokens = 32 if card.small else TOKENS
    for name, (wide, out) in shapes.items():
        _products(card, rows, f"{name} {tokens}x{wide}x{out}", tokens, wide, out)
    for compiled in (False, True):
        for name, (wide, out) in shapes.items():
            torch._dynamo.reset()  # else a second shape would be compiled as dynamic
            _layers(card, rows, f"{name} {tokens}x{wide}x{out}", tokens, wide, out, compiled)


def _products(card: Card, rows: Rows, what: str, tokens: int, wide: int, out: int) -> None:
    x = torch.randn(tokens, wide, device=card.device, dtype=card.dtype)
    w = torch.randn(out, wide, device=card.device, dtype=card.dtype)
    x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    one = torch.ones((), device=card.device)
    by_row = torch.ones(tokens, 1, device=card.device), torch.ones(1, out, device=card.device)

    def scaled(scale_a: torch.Tensor, scale_b: torch.Tensor, fast: bool) -> Callable[[], object]:
        return lambda: torch._scaled_mm(
            x8, w8.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=card.dtype, use_fast_accum=fast
        )

    for name, run in {
        "fp8, one scale": scaled(one, one, False),
        "fp8, one scale, fast accumulation": scaled(one, one, True),
        "fp8, a scale per row, fast accumulation": scaled(*by_row, True),
    }.items():
        _beside(card, rows, f"product {what}: {name}", lambda: x @ w.t(), lambda run=run: run)


def _layers(
    card: Card, rows: Rows, what: str, tokens: int, wide: int, out: int, compiled: bool
) -> None:
    x = torch.randn(tokens, wide, device=card.device, dtype=card.dtype, requires_grad=True)
    g = torch.randn(tokens, out, device=card.device, dtype=card.dtype)

    def layer() -> nn.Module:
        return nn.Sequential(nn.Linear(wide, out, bias=False, device=card.device, dtype=card.dtype))

    def plain(model: nn.Module) -> Callable[[], object]:
        if compiled:
            card.compile(model)

        def run() -> None:
            model(x).backward(g)
            x.grad = model[0].weight.grad = None

        return run

    def ours(format: str, backend: str) -> Callable[[], object]:
        model = layer()
        table = converted(model, format, backend)
        if compiled:
            card.compile(model)

        def run() -> None:
            with table.forward_context():
                output = model(x)
            output.backward(g)
            table.step()
            x.grad = model[0].weight.grad = None

        return run

    known = alternatives(card)
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        name: lambda format=format, backend=backend: ours(format, backend)
        for name, (format, backend) in known.items()
    }
    for recipe in ("tensorwise", "rowwise"):
        makers[f"torchao {recipe}"] = lambda recipe=recipe: plain(_torchao(layer(), recipe, card))
    bf16 = plain(layer())
    for name, make in makers.items():
        # One at a time, each beside BF16: a card throttles, and each compilation takes its while.
        row = f"layer {what}, {'compiled' if compiled else 'eager'}: {name}"
        measured = _beside(card, rows, row, bf16, make)
        if compiled and measured and name in known:
            predicted = prediction.of_layer(card, *known[name], tokens, wide, out)
            prediction.add(card, rows, row, predicted, measured)


def _torchao(model: nn.Module, recipe: Any, card: Card) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    if card.small:
        config = dataclasses.replace(config, emulate=True)
    return convert_to_float8_training(model, config=config)


def _beside(
    card: Card,
    rows: Rows,
    what: str,
    bf16: Callable[[], object],
    make: Callable[[], Callable[[], object]],
) -> float | None:
    """One row; what cannot run here is a row with the reason.

    Returns:
        How many times as fast as BF16 it is; None where it cannot run.
    """
    try:
        run = make()
        run()
    except Exception as error:
        rows.add(what, None, note=first_line(error))
        return None
    times = card.medians({BF16: bf16, "fp8": run})
    note = f"BF16 {times[BF16] * 1e3:.4g} ms, measured in turn"
    ratio = times[BF16] / times["fp8"]
    rows.add(what, times["fp8"] * 1e3, "ms", ratio=ratio, note=note)
    return ratio
