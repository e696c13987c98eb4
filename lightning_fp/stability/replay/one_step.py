"""Run a batch again in other formats, as a transaction, and compare what came out.

Same batch, same weights, same random numbers: what differs is due to formats. Forward and backward
run as always, and everything they write is put back (`untouched`); no optimizer steps, so weights
need not be copied. Running out of memory is an outcome and no error, since high precision may keep
more activations than there is room for. Over ranks, squared norms add up where cosines do not:
so sums are exchanged, and angles made of them at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_fp.layers import FormatLike, PrecisionMap
from lightning_fp.layers.statistics_table import StatisticsTable, observable
from lightning_fp.numerics.combining import wide_dtype
from lightning_fp.rank_group import current_group, ranks
from lightning_fp.stability.keep.random_state import RandomState
from lightning_fp.stability.replay.untouched import untouched

Outcome = Literal["done", "no loss", "out of memory", "failed on another rank"]

_OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
"""From good to bad: the worst of all ranks is the largest index."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """One forward and backward of which nothing else is left."""

    outcome: Outcome = "done"
    """Whether it ran to its end. Anything but "done" comes without numbers."""

    loss: Tensor | None = None
    """Scalar, on the device."""

    gradients: Sequence[Tensor | None] = ()
    """One per parameter, in the order of `model.parameters()`, on the device in their dtype."""

    casts: Mapping[str, Tensor] | None = None
    """By layer, if asked for: float64 [operands, statistics] of this rank, see
    `lightning_fp.layers.statistics_table`."""


@dataclass(frozen=True, kw_only=True)
class GradientGap:
    """How far one gradient is from another, over all ranks."""

    cosine: float
    """Of the angle between the two; NaN where one is zero or not finite."""

    norm_ratio: float
    """Norm of the first over norm of the second."""

    error: float
    """Norm of the difference over norm of the second; 0 for equal ones, also where both are 0."""

    norm: float = 0.0
    """Norm of the second."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One replay against another."""

    losses: tuple[float, float]
    """Mean over ranks, of the first and of the second."""

    all: GradientGap
    """Of all parameters together."""

    layers: Mapping[str, GradientGap]
    """Of each switchable layer's own parameters."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradients of the second are."""
        return math.isfinite(self.losses[1]) and math.isfinite(self.all.norm)


def replay_step(
    step: Callable[[], Tensor | None],
    model: nn.Module,
    table: PrecisionMap,
    *,
    formats: Mapping[str, FormatLike] | None = None,
    rng: RandomState | None = None,
    observe: bool = False,
    others: Sequence[object] = (),
) -> Replay:
    """Run forward and backward of one batch and leave no trace; see `untouched`.

    Args:
        step: runs both and returns the loss; None if there was none.
        model: what `step` calls, with its wrappers.
        table: the formats of its layers.
        formats: other formats for this time, by exact layer name.
        rng: the random state to run from; None takes the present one.
        observe: whether to look at the casts too.
        others: what else `step` may write attributes of; see `untouched`.

    Returns:
        The loss and the gradients, or that memory did not suffice. Gradients are this rank's,
        unless the strategy cannot run without exchanging them (FSDP).
    """
    try:
        with untouched(model, others), table.overridden(formats or {}):
            if rng is not None:
                rng.restore()
            casts = _observe(table) if observe else None
            loss = step()
            gradients = [parameter.grad for parameter in model.parameters()]
            return Replay(
                outcome="no loss" if loss is None else "done",
                loss=None if loss is None else loss.detach(),
                gradients=gradients,
                casts=None if casts is None else dict(zip(casts.names, casts.take(), strict=True)),
            )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the handler, which kept the frames of the step and with them its tensors.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return Replay(outcome="out of memory")


def on_all_ranks(replay: Callable[[], Replay], device: torch.device) -> Replay:
    """A replay whose outcome is the worst of all ranks'; a collective.

    Args:
        replay: of this rank.
        device: where collectives run.

    Raises:
        Exception: what the training step raised, on the ranks where it did.
    """
    error: Exception | None = None
    try:
        result = replay()
    except Exception as failure:
        error, result = failure, Replay(outcome="failed on another rank")
    # Before anything is raised: the other ranks wait here, and would do so for ever.
    outcome = _worst_of_ranks(result.outcome, device)
    if error is not None:
        raise error
    return result if outcome == result.outcome else Replay(outcome=outcome)


def _worst_of_ranks(outcome: Outcome, device: torch.device) -> Outcome:
    if ranks() == 1:
        return outcome
    code = torch.tensor(_OUTCOMES.index(outcome), device=device)
    dist.all_reduce(code, op=dist.ReduceOp.MAX, group=current_group())
    return _OUTCOMES[int(code)]


def _observe(table: PrecisionMap) -> StatisticsTable:
    """Look at the casts of all rows; leaving `untouched` ends it."""
    casts = StatisticsTable(observable(table.layers), stride=1)
    casts.collect(True)
    return casts


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory did not suffice."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "can't allocate memory" in str(error)  # the CPU's allocator has no class of its own
    )


@torch.no_grad()
def compare(one: Replay, other: Replay, model: nn.Module, table: PrecisionMap) -> Comparison:
    """The first replay's loss and gradients against the second's; a collective if distributed.

    Args:
        one: a replay that is done.
        other: the replay to measure it by.
        model: the model of both.
        table: the layers of which to give the gap.

    Returns:
        Numbers over all ranks, alike on all.
    """
    layer_of = {id(p): name for name, layer in table.layers.items() for p in _parameters(layer)}
    names = [layer_of.get(id(parameter)) for parameter in model.parameters()]
    sums = [_sums(a, b) for a, b in zip(one.gradients, other.gradients, strict=True)]
    losses = [replay.loss.double() for replay in (one, other) if replay.loss is not None]
    device = losses[0].device
    everything = [*losses, torch.ones((), device=device), *(s.to(device) for s in sums)]
    flat = torch.cat([value.double().reshape(-1) for value in everything])
    if ranks() > 1:
        dist.all_reduce(flat, group=current_group())
    values: list[float] = flat.tolist()
    count, rows = values[2], [values[i : i + 3] for i in range(3, len(values), 3)]
    by_layer: dict[str, list[list[float]]] = {name: [] for name in table.layers}
    for name, row in zip(names, rows, strict=True):
        if name is not None:
            by_layer[name].append(row)
    return Comparison(
        losses=(values[0] / count, values[1] / count),
        all=_gap(rows),
        layers={name: _gap(rows) for name, rows in by_layer.items()},
    )


def _parameters(layer: object) -> list[nn.Parameter]:
    return list(layer.parameters()) if isinstance(layer, nn.Module) else []


def _sums(a: Tensor | None, b: Tensor | None) -> Tensor:
    """float64 [3]: squared norms of a, of b and of their difference; None counts as zero."""
    some = a if a is not None else b
    if some is None:
        return torch.zeros(3, dtype=torch.float64)
    a, b = (torch.zeros_like(some) if x is None else x for x in (a, b))
    # FSDP2: this rank's shard. The sums over ranks are then those of the whole.
    a, b = (x.to_local() if hasattr(x, "to_local") else x for x in (a, b))  # pyright: ignore
    if a.is_sparse != b.is_sparse:
        a, b = (x.to_dense() if x.is_sparse else x for x in (a, b))
    if a.is_sparse:
        a, b = (x.float() if x.element_size() < 4 else x for x in (a, b))
    difference = (a.float() if a.element_size() < 4 else a) - b
    return torch.stack([_squared(x) for x in (a, b, difference)])


def _squared(gradient: Tensor) -> Tensor:
    """Squared norm, of a sparse one over the elements there are, of a complex one of both parts."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    return torch.linalg.vector_norm(values, dtype=wide_dtype(values.device)).square()


def _gap(rows: Sequence[Sequence[float]]) -> GradientGap:
    a, b, difference = (sum(row[column] for row in rows) for column in range(3))
    if difference == 0:
        return GradientGap(cosine=1.0, norm_ratio=1.0, error=0.0, norm=b**0.5)
    # From the difference: exact where the two are close, which is where it matters.
    norms = (a * b) ** 0.5
    return GradientGap(
        cosine=(a + b - difference) / 2 / norms if norms > 0 else float("nan"),
        norm_ratio=(a / b) ** 0.5 if b > 0 else float("inf"),
        error=(difference / b) ** 0.5 if b > 0 else float("inf"),
        norm=b**0.5,
    )


def exchanges_in_any_case(model: nn.Module) -> bool:
    """Whether the coming backward exchanges gradients even where that is blocked, as in a replay.

    The first one of a static-graph DDP does, which enqueues the exchange itself (`_DDPSink` in
    torch.nn.parallel.distributed).

    Args:
        model: with its wrappers.
    """
    enqueued = getattr(model, "_static_graph_delay_allreduce_enqueued", True)
    return bool(getattr(model, "static_graph", False)) and not enqueued
