"""One arm of an A/B of precision: a short run with everything recorded at every step."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeAlias

import lightning as L
import pyarrow as pa
import pyarrow.compute as compute
import torch
from typing_extensions import override

from lightning_fp.callbacks import ClampMonitor, LossRecorder
from lightning_fp.layers import FormatLike
from lightning_fp.layers.scaling import ScalingLike
from lightning_fp.plugins import FP8Precision
from lightning_fp.records import read_statistics, read_steps
from lightning_fp.records.loss import Loss
from lightning_fp.study.spikes import SpikeRule, find_spikes
from lightning_fp.study.training_job import quiet

Factory: TypeAlias = Callable[[], tuple[Any, ...]]
"""Takes nothing, returns a LightningModule, its training dataloader and, if wanted, a mapping of
further options of the Trainer, e.g. `{"gradient_clip_val": 1.0}`."""

# pyarrow makes its functions at import, out of sight of type checkers.
pc: Any = compute


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one run came to."""

    format: str
    """Of the suspected layers."""

    final_loss: float
    """Mean over the last fifth of the steps; NaN if one of them was not finite."""

    spikes: int
    """Loss spikes."""

    nonfinite_steps: int
    """Steps with a loss that is inf or NaN."""

    clamped_mass: float
    """Mean clamped mass of the suspected layers' operands over all sampled steps."""

    clamped_mass_max: float
    """The largest in any of them."""

    overflow_bits: float
    """How far their largest value was beyond the format's range at any step; 0 if it never was."""

    grad_norm: float
    """Median norm of the gradient of all parameters, before clipping."""

    grad_norm_max: float

    losses: tuple[float, ...]
    """By step."""


class _Switch(L.Callback):
    """Names the suspected layers, and writes their other format before the first step."""

    def __init__(self, patterns: Sequence[str], format: FormatLike | None) -> None:
        self.layers: list[str] = []
        self.format = ""
        self._patterns, self._to = patterns, format

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        plugin = trainer.precision_plugin
        assert isinstance(plugin, FP8Precision)
        table = plugin.precision_map
        matched = {name for pattern in self._patterns for name in table.matching(pattern)}
        self.layers = [name for name in table.layers if name in matched]
        formats = {table.layers[name].format for name in self.layers}
        if other := sorted(format.name for format in formats if format.scaling != "delayed"):
            raise ValueError(
                f"layers {', '.join(self._patterns)} must be under delayed scaling, which alone"
                f" clamps; got {', '.join(other)}; narrow the pattern, or name a delayed format"
            )
        self.format = ", ".join(sorted(format.name for format in formats))
        if self._to is not None:
            for name in self.layers:
                why = "arm B of the clamp study"
                table.set(glob.escape(name), self._to, reason=why, author="study")
            plugin.boundary()
            self.format = ", ".join(sorted({table.formats()[name] for name in self.layers}))


def run_arm(
    factory: Factory,
    directory: Path,
    *,
    layers: Sequence[str],
    switch_to: FormatLike | None,
    steps: int,
    seed: int,
    scaling: ScalingLike,
    rules: Mapping[str, FormatLike] | None,
    every_n_steps: int,
    spike_rule: SpikeRule,
) -> tuple[Arm, list[str]]:
    """Train once; the monitor's statistics and loss go to `directory`.

    Args:
        factory: builds model and data anew.
        directory: where the records go.
        layers: patterns of the suspected layers.
        switch_to: their other format, or None to leave them as they are.
        steps: optimizer steps.
        seed: of weights and data order.
        scaling: of the plugin.
        rules: of the plugin.
        every_n_steps: one step in so many is sampled.
        spike_rule: what counts as a loss spike.

    Returns:
        The arm, and the names of the suspected layers.

    Raises:
        ValueError: if the factory returns something else, a pattern matches nothing or a layer
            that cannot clamp, or the run makes no step.
    """
    L.seed_everything(seed, verbose=False)
    module, loader, options = _built(factory)
    switch = _Switch(layers, switch_to)
    monitor = ClampMonitor(
        every_n_steps,
        dirpath=directory,
        log_every_n_steps=every_n_steps,
        warn_clamped_mass=None,
        warn_underflow=None,
        warn_nonfinite=None,
        seed=seed,
    )
    watching = [switch, monitor, LossRecorder(directory)]
    callbacks: list[L.Callback] = [*watching, *options.pop("callbacks", ())]
    trainer = L.Trainer(
        **{**quiet(), **options},
        max_steps=steps,
        plugins=FP8Precision(scaling, layers=rules),
        callbacks=callbacks,
    )
    trainer.fit(module, loader)
    if not trainer.global_step:
        raise ValueError("the run made no step: the factory's dataloader must have batches")
    directory = monitor.run_dir or directory
    recorded = read_steps(directory)
    if not len(recorded):
        raise ValueError("training_step must return a loss for the A/B, got none in any step")
    losses = torch.tensor(recorded["loss"].to_pylist(), dtype=torch.float64)
    loss = Loss.of(recorded["step"].to_pylist(), losses)
    norms: list[float] = recorded["grad_norm"].drop_null().to_pylist()
    masses, overflow = _clamping(directory, switch.layers)
    arm = Arm(
        format=switch.format,
        final_loss=float(losses[-tail(len(losses)) :].mean()),
        spikes=len(find_spikes(loss, spike_rule)),
        nonfinite_steps=int((~torch.isfinite(losses)).sum()),
        clamped_mass=fmean(masses) if masses else 0.0,
        clamped_mass_max=max(masses, default=0.0),
        overflow_bits=overflow,
        grad_norm=median(norms) if norms else math.nan,
        grad_norm_max=max(norms, default=math.nan),
        losses=tuple(losses.tolist()),
    )
    return arm, switch.layers


def tail(steps: int) -> int:
    """How many steps the final loss is averaged over."""
    return max(1, steps // 5)


def _built(factory: Factory) -> tuple[L.LightningModule, Iterable[Any], dict[str, Any]]:
    built = factory()
    parts = built if isinstance(built, tuple) else (built,)
    module, loader, options = (*parts, None, None)[:3]
    if not isinstance(module, L.LightningModule) or loader is None or len(parts) > 3:
        raise ValueError(
            "the factory must return a LightningModule, a dataloader and, if wanted, a mapping of"
            f" Trainer options; got {', '.join(type(part).__name__ for part in parts)}"
        )
    return module, loader, dict(options or {})


def _clamping(directory: Path, layers: Sequence[str]) -> tuple[list[float], float]:
    """Some layers' clamped masses on all sampled steps, and their overflow in bits."""
    rows = read_statistics(directory, columns=["layer", "clamped_mass", "headroom_bits"])
    chosen = rows.filter(pc.is_in(rows["layer"].cast(pa.string()), pa.array(layers, pa.string())))
    headroom: float | None = pc.min(chosen["headroom_bits"]).as_py()
    return chosen["clamped_mass"].drop_null().to_pylist(), max(0.0, -(headroom or 0.0))
