"""What FP8 is predicted to gain on a card: of each layer, of all linear layers, of the whole step.

A step in bf16 is what its linear layers take, attention, other products, the loops between them and
the optimizer, each against the card; and a share that none of these explains: communication,
launches, waits. That share is taken from public runs in bf16 alone, and stays what it is in FP8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_fp.kernels.cost.data_sheets import (
    DATA_SHEETS,
    MEMORY_EFFICIENCY,
    DataSheet,
    Hardware,
)
from lightning_fp.kernels.cost.grouped import grouped_cost, predicted_grouped_speedup
from lightning_fp.kernels.cost.linear import TOKENS, LinearCost, linear_cost, predicted_speedup
from lightning_fp.kernels.cost.passes import Casting
from lightning_fp.layers.conversion.casting import casting_of
from lightning_fp.layers.conversion.work import Work, example_work, guessed_input
from lightning_fp.layers.experts.experts import FPExperts, is_switchable_experts
from lightning_fp.layers.experts.kinds import experts_per_token
from lightning_fp.layers.format import LinearFormat, linear_format
from lightning_fp.layers.linear import has_formats
from lightning_fp.layers.rules import clean_named_modules

EXPLAINED = 0.68
"""Share of a bf16 step that products, attention, loops and optimizer explain: see
`benchmarks/predicted.py`, over the bf16 runs of MosaicML's llm-foundry on eight and more H100
(scripts/train/benchmarking/README.md)."""

BACKWARD = 2
"""Passes over memory in backward for one in forward, as for FLOPs of products."""

ATTENTION_BACKWARD = 2.5
"""FLOPs of attention in backward for one in forward: five products for two, one of them made again
(arXiv 2307.08691)."""

OPTIMIZER_BYTES = 28
"""Of each parameter per step, Adam in float32: weight, gradient and two moments read, three of
them written."""


@dataclass(frozen=True, kw_only=True)
class LayerPrediction:
    """One layer, or the experts of one row, for one micro-batch."""

    casting: Casting | None
    """How its operands are cast; None: it stays in high precision."""

    tokens: int
    """Of all its calls."""

    speedup: float
    """Over bf16, by itself, forward and backward, compiled; 1 where it stays in bf16."""

    flops: int
    """Forward and backward."""

    bytes: float
    """Read and written in its format, forward and backward."""

    bytes_bf16: float
    """Likewise in bf16."""

    loses: bool
    """Whether it would be faster in bf16."""

    inputs: int
    """Elements of inputs that backward needs."""

    experts: int = 0
    """How many experts it stands for; 0: it is a linear layer."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a table of formats gains on a card."""

    card: DataSheet
    tokens: int
    """Of a micro-batch."""

    layers: Mapping[str, LayerPrediction]
    linears: float
    """Seconds of all linear layers and experts in their formats."""

    linears_bf16: float
    """Seconds of all linear layers and experts in bf16."""

    known: float | None
    """Seconds of attention, other products, loops and optimizer; None where none was counted."""

    unexplained: float
    """Seconds of what a step takes beside, in bf16."""

    gathered: float
    """Seconds of that which an all-gather of FP8 weights saves, as if nothing hid any of it."""

    optimizer_bytes: float
    """Of weights, gradients and moments on one device."""

    @property
    def speedup(self) -> float:
        """Of the linear layers and experts together, over bf16."""
        return self.linears_bf16 / self.linears if self.linears else 1.0

    @property
    def speedup_end_to_end(self) -> float | None:
        """Of the whole step; None where the rest of it is not known."""
        if self.known is None:
            return None
        rest = self.known + self.unexplained
        return (self.linears_bf16 + rest) / (self.linears + rest - self.gathered)


def predict(
    model: nn.Module,
    formats: Mapping[str, LinearFormat],
    card: DataSheet,
    work: Work | None,
    *,
    backend: str = "auto",
    tokens: int | None = None,
    devices: int = 1,
    fp8_all_gather: bool = False,
) -> Prediction:
    """Predict what formats gain.

    Args:
        model: as `work` was counted on.
        formats: of the linear layers and experts, by name.
        card: what it trains on.
        work: of one forward; None: each layer once, and of everything else nothing is known.
        backend: what multiplies, as `convert` takes it.
        tokens: of a micro-batch, to which `work` is scaled; None: as it was counted.
        devices: over how many the state of the optimizer is divided.
        fp8_all_gather: whether weights are gathered in FP8, and so arrive cast.
    """
    scale = tokens / work.tokens if work is not None and work.tokens and tokens else 1.0
    layers: dict[str, LayerPrediction] = {}
    cast_inputs: set[tuple[int, Casting]] = set()
    linears = linears_bf16 = cast_weights = 0.0
    for name, module in clean_named_modules(model):
        if not has_formats(module) or name not in formats:
            continue
        calls = [(tokens or TOKENS, -1)]
        if work is not None:
            if name not in work.layers:
                continue
            each = work.layers[name]
            counts = (max(round(count * scale), 1) for count in each.tokens)
            calls = list(zip(counts, each.inputs, strict=True))
        shape = module.in_features, module.out_features
        weight_bytes = 2 if devices > 1 else min(module.weight.element_size(), 4)
        casting = casting_of(formats[name], backend)
        high = [
            linear_cost(card, None, count, *shape, weight_bytes=weight_bytes) for count, _ in calls
        ]
        low = high
        if casting is not None:
            cast_weights += module.in_features * module.out_features
            low = [
                linear_cost(
                    card,
                    casting,
                    count,
                    *shape,
                    weight_bytes=weight_bytes,
                    input_is_cast=(number, casting) in cast_inputs,
                    weight_is_cast=fp8_all_gather,
                )
                for count, number in calls
            ]
            cast_inputs |= {(number, casting) for _, number in calls if number >= 0}
        linears += sum(cost.seconds for cost in low)
        linears_bf16 += sum(cost.seconds for cost in high)
        layers[name] = _of_layer(card, casting, calls, shape, weight_bytes, low, high)
    counted = 0
    for experts in _experts(model, formats, card, work, scale, backend, tokens, devices):
        layers[experts.name] = experts.prediction
        linears += experts.seconds
        linears_bf16 += experts.seconds_bf16
        counted += experts.prediction.flops // 3
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    known = None if work is None else _known(work, card, scale, counted, parameters / devices)
    unexplained = (1 / EXPLAINED - 1) * (linears_bf16 + (known or 0.0))
    # In forward and in backward, a byte per weight less from every other device.
    gathered = 2 * cast_weights * (devices - 1) / devices / card.link
    return Prediction(
        card=card,
        tokens=tokens or (TOKENS if work is None else work.tokens),
        layers=layers,
        linears=linears,
        linears_bf16=linears_bf16,
        known=known,
        unexplained=unexplained,
        gathered=min(gathered, unexplained) if fp8_all_gather else 0.0,
        optimizer_bytes=16 * parameters / devices,
    )


def _of_layer(
    card: DataSheet,
    casting: Casting | None,
    calls: list[tuple[int, int]],
    shape: tuple[int, int],
    weight_bytes: int,
    low: list[LinearCost],
    high: list[LinearCost],
) -> LayerPrediction:
    tokens = sum(count for count, _ in calls)
    most = max(count for count, _ in calls)
    speedup = 1.0
    if casting is not None:
        speedup = predicted_speedup(card, casting, most, *shape, weight_bytes=weight_bytes)
    return LayerPrediction(
        casting=casting,
        tokens=tokens,
        speedup=speedup,
        flops=sum(cost.flops for cost in high),
        bytes=sum(cost.bytes for cost in low),
        bytes_bf16=sum(cost.bytes for cost in high),
        loses=casting is not None and speedup <= 1,
        inputs=tokens * shape[0],
    )


@dataclass(frozen=True, kw_only=True)
class _Experts:
    name: str
    prediction: LayerPrediction
    seconds: float
    seconds_bf16: float


def _experts(
    model: nn.Module,
    formats: Mapping[str, LinearFormat],
    card: DataSheet,
    work: Work | None,
    scale: float,
    backend: str,
    tokens: int | None,
    devices: int,
) -> Iterator[_Experts]:
    """Rows of experts: each expert has the same share of a module's tokens."""
    for name, module in clean_named_modules(model):
        if not is_switchable_experts(module) or name not in formats:
            continue
        calls = [(tokens or TOKENS) * (experts_per_token(module) or 1)]
        if work is not None:
            calls = [max(round(rows * scale), 1) for rows in work.experts.get(name, ())]
        alone = {row.fqn: 1 for row in module.apart.values() if row.fqn in formats}
        for row, experts in {name: module.shape.experts - len(alone), **alone}.items():
            casting = casting_of(formats[row], backend)
            share = experts / module.shape.experts
            if experts and calls:
                rows = [max(round(each * share), 1) for each in calls]
                yield _of_experts(row, module, card, casting, rows, experts, devices)


def _of_experts(
    name: str,
    module: FPExperts,
    card: DataSheet,
    casting: Casting | None,
    calls: list[int],
    experts: int,
    devices: int,
) -> _Experts:
    weight_bytes = 2 if devices > 1 else min(module.weight.element_size(), 4)
    # [experts, a, b]: whichever of the two is summed over, the products cost the same but for casts
    shapes = [tuple(weight.shape[:0:-1]) for weight in module.kind.weights(module)]
    if getattr(module, "is_transposed", False):
        shapes = [(out, into) for into, out in shapes]
    each = [(rows, experts, *shape) for rows in calls for shape in shapes]
    high = [grouped_cost(card, None, *size, weight_bytes=weight_bytes) for size in each]
    low = high
    speedup = 1.0
    if casting is not None:
        low = [grouped_cost(card, casting, *size, weight_bytes=weight_bytes) for size in each]
        speedup = sum(cost.seconds for cost in high) / sum(cost.seconds for cost in low)
        gains = [
            predicted_grouped_speedup(card, casting, *size, weight_bytes=weight_bytes) > 1
            for size in each
        ]
        speedup = speedup if all(gains) else min(speedup, 1.0)
    return _Experts(
        name=name,
        prediction=LayerPrediction(
            casting=casting,
            tokens=sum(calls),
            speedup=speedup,
            flops=sum(cost.flops for cost in high),
            bytes=sum(cost.bytes for cost in low),
            bytes_bf16=sum(cost.bytes for cost in high),
            loses=casting is not None and speedup <= 1,
            inputs=sum(rows * into for rows, _, into, _ in each),
            experts=experts,
        ),
        seconds=sum(cost.seconds for cost in low),
        seconds_bf16=sum(cost.seconds for cost in high),
    )


def _known(work: Work, card: DataSheet, scale: float, experts: float, parameters: float) -> float:
    """Seconds of what is counted of a step beside its layers; the same in every format.

    Args:
        work: of one forward.
        card: what it trains on.
        scale: of the tokens, over those of `work`.
        experts: FLOPs of its products that are experts', of one forward.
        parameters: that the optimizer of one device has.
    """
    others = max(work.product_flops * scale - experts, 0.0)
    attention = work.attention_flops * (1 + ATTENTION_BACKWARD)
    seconds = attention * scale / (card.bf16 * card.attention_efficiency)
    seconds += 3 * others / (card.bf16 * card.bf16_efficiency)
    moved = work.passes * scale * (1 + BACKWARD) + OPTIMIZER_BYTES * parameters
    return seconds + moved / (card.bandwidth * MEMORY_EFFICIENCY)


def predicted_end_to_end(
    model: nn.Module,
    formats: Mapping[str, str],
    hardware: Hardware,
    *,
    example_input: Any = None,
    tokens: int | None = None,
    devices: int = 1,
) -> float | None:
    """How much faster a whole step is predicted to be than in bf16.

    Args:
        model: on any device, also meta.
        formats: of its linear layers, by name; layers that are not named count as bf16.
        hardware: what it trains on.
        example_input: arguments of one forward; by default a guess at `tokens` tokens.
        tokens: of a micro-batch; by default those of the example.
        devices: over how many the state of the optimizer is divided.

    Returns:
        A factor; None where no forward could be counted.
    """
    given = guessed_input(model, tokens or TOKENS) if example_input is None else example_input
    try:
        work = example_work(model, given)
    except Exception:  # whatever a user's forward raises
        return None
    read = {name: linear_format(formats.get(name, "bf16")) for name in work.layers}
    found = predict(model, read, DATA_SHEETS[hardware], work, tokens=tokens, devices=devices)
    return found.speedup_end_to_end
