"""One batch in the current formats and in high precision, on the same weights, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_fp.layers import LinearFormat, PrecisionMap
from lightning_fp.layers.statistics_table import over_ranks
from lightning_fp.numerics.combining import COLUMN
from lightning_fp.stability.replay.one_step import Replay, compare


class Run(Protocol):
    """Replays one batch, always the same and from the same random state."""

    def __call__(self, formats: Mapping[str, LinearFormat], *, observe: bool = False) -> Replay:
        """A replay in other formats; alike on all ranks, so too whether it is done."""
        ...


@dataclass(frozen=True, kw_only=True)
class LayerParity:
    """What one layer's format does to this batch."""

    layer: str
    format: str

    cosine: float
    """Between the gradients of its parameters in the current formats and in high precision."""

    norm_ratio: float
    """Of the same, current over high."""

    cast_error: float
    """Largest relative error of its casts and of the product, with its inputs as they are: what
    it does by itself, whatever the others do. inf where an operand was not finite."""

    removed_error: float | None = None
    """Share of the squared error of all gradients that is gone when this layer alone runs in high
    precision (independent errors add up to 1 over all layers); negative if it grows; None if that
    was not tried."""

    removed_loss_gap: float | None = None
    """The same of the size of the loss gap. Among healthy layers errors of the loss cancel, and
    this is noise: go by `removed_error`."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The current formats against high precision: one batch, one set of weights."""

    loss: float
    """In high precision, mean over ranks."""

    loss_gap: float
    """Loss in the current formats minus loss in high precision."""

    grad_cosine: float
    """Between the two gradients of all parameters, all ranks' gradients as one vector."""

    grad_norm_ratio: float
    """Current over high."""

    grad_error: float
    """Norm of the difference over the norm in high precision."""

    noise: float
    """`grad_error` of the current formats against themselves: 0 unless kernels are
    nondeterministic or the hardware is at fault. What is not well above it means nothing."""

    layers: tuple[LayerParity, ...]
    """Every switchable layer, in the order of the model."""

    @property
    def worst(self) -> list[LayerParity]:
        """The layers tried one by one, the one that removes most of the error first."""
        tried = [layer for layer in self.layers if layer.removed_error is not None]
        return sorted(tried, key=lambda layer: -(layer.removed_error or 0.0))


class ReplayFailedError(RuntimeError):
    """A replay was not done on some rank; the message says why."""


def measure_parity(
    run: Run, model: nn.Module, table: PrecisionMap, high: LinearFormat, *, worst: int = 4
) -> Parity:
    """Compare the current formats with high precision, and find the layers that matter.

    Costs 3 replays (twice in the current formats, once in high precision), and one for each
    layer tried. Holds two sets of gradients at a time.

    Args:
        run: replays the batch.
        model: what it calls, with its wrappers.
        table: the formats.
        high: the high precision to compare with.
        worst: how many layers to try alone, those with the largest cast errors first.

    Returns:
        The comparison; alike on all ranks.

    Raises:
        ReplayFailedError: if a replay was not done.
    """
    low = [n for n, layer in table.layers.items() if not layer.format.is_high_precision]
    current = _done(run({}, observe=True))
    # What two runs of the same differ by bounds what any other difference can mean.
    noise = compare(_done(run({})), current, model, table).all.error
    reference = _done(run(dict.fromkeys(low, high)))
    gap = compare(current, reference, model, table)
    errors = cast_errors(current)
    del current
    loss, reference_loss = gap.losses
    removed: dict[str, tuple[float, float]] = {}
    for name in sorted(low, key=lambda name: -errors.get(name, 0.0))[:worst]:
        without = compare(_done(run({name: high})), reference, model, table)
        removed[name] = (
            _removed(gap.all.error**2, without.all.error**2),
            _removed(abs(loss - reference_loss), abs(without.losses[0] - reference_loss)),
        )
    layers = [
        LayerParity(
            layer=name,
            format=layer.format.name,
            cosine=gap.layers[name].cosine,
            norm_ratio=gap.layers[name].norm_ratio,
            cast_error=errors.get(name, 0.0),
            removed_error=removed[name][0] if name in removed else None,
            removed_loss_gap=removed[name][1] if name in removed else None,
        )
        for name, layer in table.layers.items()
    ]
    return Parity(
        loss=reference_loss,
        loss_gap=loss - reference_loss,
        grad_cosine=gap.all.cosine,
        grad_norm_ratio=gap.all.norm_ratio,
        grad_error=gap.all.error,
        noise=noise,
        layers=tuple(layers),
    )


def _done(replay: Replay) -> Replay:
    if replay.outcome != "done":
        raise ReplayFailedError(f"the replay was not done: {replay.outcome}")
    return replay


def _removed(error: float, without: float) -> float:
    """The share of `error` that is gone; not finite counts as infinitely large."""
    if not math.isfinite(error):
        return 1.0 if math.isfinite(without) else 0.0
    if error == 0 or not math.isfinite(without):
        return 0.0 if error == without else -math.inf
    return 1 - without / error


def cast_errors(observed: Replay) -> dict[str, float]:
    """The largest relative error of each layer's casts, over all ranks."""
    if not observed.casts:
        return {}
    sums: Tensor = over_ranks(torch.stack(list(observed.casts.values())))
    signal, noise = sums[..., COLUMN["signal"]], sums[..., COLUMN["noise"]]
    error = torch.where(signal > 0, (noise / signal).sqrt(), 0.0)
    error = torch.where(sums[..., COLUMN["nonfinite"]] > 0, torch.inf, error)
    return dict(zip(observed.casts, error.amax(dim=-1).tolist(), strict=True))
