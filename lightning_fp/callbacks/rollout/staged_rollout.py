"""StagedRollout: takes a run from high precision to FP8 in stages, behind gates."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from typing_extensions import override

from lightning_fp.callbacks.clamp.summary import flops_share
from lightning_fp.callbacks.fallback.precision_fallback import PrecisionFallback
from lightning_fp.callbacks.rollout.rollout_progress import LossSource, TokenCounter
from lightning_fp.callbacks.rollout.rollout_sources import (
    LOSS,
    LOSS_GAP,
    MetricSource,
    Points,
    Source,
    collect,
    find_sources,
    statistic,
)
from lightning_fp.callbacks.run.run import RunCallback, run_of
from lightning_fp.callbacks.run.run_log import RunLog
from lightning_fp.layers import LinearFormat, PrecisionMap
from lightning_fp.plugins.base import LayerPrecision
from lightning_fp.recipes import (
    Rollout,
    RolloutDecision,
    RolloutRecipe,
    RolloutSignals,
    RolloutState,
    StageFormats,
    formats_by_stage,
    read,
)
from lightning_fp.recipes.evidence import GateVerdict
from lightning_fp.recipes.text import as_plain
from lightning_fp.records.events import GateResult, Note, StageChange
from lightning_fp.state_version import check_version

log = logging.getLogger(__name__)

STATE_VERSION = 1

STAGE = "fp8/stage"
"""Under this name loggers and the progress bar show the index of the stage, from 0."""


class StagedRollout(RunCallback):
    """Takes a run through the stages of a recipe.

    Each stage gives layers their formats when it begins, between two optimizer steps and alike on
    all ranks, and lasts as long as its recipe says and its gates ask for. While PrecisionFallback
    investigates, or has layers demoted, no stage begins or ends; a layer that somebody else has
    given another format is left to them. docs/rollout.md explains recipes and every rule.

    >>> from lightning_fp import FP8Precision
    >>> from lightning_fp.callbacks import StagedRollout
    >>> trainer = L.Trainer(
    ...     accelerator="cpu", plugins=FP8Precision(), callbacks=[StagedRollout("bf16-cooldown")]
    ... )

    Args:
        recipe: a `RolloutRecipe`, the name of a built-in one (`lightning_fp.recipes.names()`),
            the path of a YAML file, or YAML text.
        baseline: directory of a recorded run, with whose loss gates on "loss_gap" compare.
        tokens_per_step: tokens of one optimizer step over all ranks, for stages that end by
            tokens; by default those of a batch are the elements of its first tensor of integers.
        dirpath: where events go; None takes what another callback names, else the trainer's log
            directory.

    Raises:
        ValueError: for a recipe that cannot be; at setup without a plugin of this package, for a
            pattern that matches nothing, a gate whose callback is missing, or a stage that ends by
            a share of a run whose length is not known.
    """

    def __init__(
        self,
        recipe: RolloutRecipe | str | Path,
        *,
        baseline: str | Path | None = None,
        tokens_per_step: int | None = None,
        dirpath: str | Path | None = None,
    ) -> None:
        self.recipe = read(recipe)
        """The stages."""
        if tokens_per_step is not None and tokens_per_step < 1:
            raise ValueError(f"tokens_per_step must be at least 1, got {tokens_per_step}")
        for stage in self.recipe.stages:
            for gate in stage.gates:
                if statistic(gate) == LOSS_GAP and baseline is None:
                    raise ValueError(
                        f"{stage}: {gate} needs a recorded run to compare with; give"
                        " StagedRollout(..., baseline='its directory')"
                    )
        self.baseline, self.tokens_per_step, self.dirpath = baseline, tokens_per_step, dirpath
        self._rollout = Rollout(self.recipe)
        self._state = self._rollout.init()
        self._course: list[StageFormats] = []
        self._configured: dict[str, str] = {}
        self._sources: dict[str, Source] = {}
        self._losses: LossSource | None = None
        self._tokens: TokenCounter | None = None
        self._new: Points = {}
        self._log = RunLog(None)
        self._fallback: PrecisionFallback | None = None
        self._steps = math.inf
        self._interval = 1
        self._open: int | None = None
        self._at = 0
        self._shown = -1
        self._running = False
        self._loaded: dict[str, Any] | None = None
        self._rewrite: Mapping[str, str] | None = None

    @property
    def stage(self) -> str | None:
        """The name of the stage that the run is in; None before the first."""
        stage = self._rollout.stage(self._state)
        return None if stage is None else stage.name

    @property
    def state(self) -> RolloutState:
        """Where the rollout stands, and why it is held or over."""
        return self._state

    @override
    def settings(self) -> dict[str, Any]:
        """The recipe as plain data, and the options."""
        return {
            "recipe": as_plain(self.recipe),
            # absolute, since a report is made elsewhere than the run
            "baseline": None if self.baseline is None else str(Path(self.baseline).absolute()),
            "tokens_per_step": self.tokens_per_step,
        }

    # -- set-up ---------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a Trainer without a table of formats, or without what the gates ask for."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        _plugin(trainer)
        self._state, self._loaded, self._rewrite = self._rollout.init(), None, None
        trainers: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        self._interval = max(1, trainers)
        self._sources = find_sources(self.recipe, trainer, self._interval)
        statistics = [statistic(gate) for stage in self.recipe.stages for gate in stage.gates]
        until = {key for stage in self.recipe.stages for key in stage.until}
        asked = LOSS in until or LOSS in statistics or LOSS_GAP in statistics
        self._losses = LossSource(self.baseline) if asked else None
        tokens = TokenCounter(self.tokens_per_step, self._interval)
        self._tokens = tokens if "tokens" in until else None
        callbacks: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
        watching = [c for c in callbacks if isinstance(c, PrecisionFallback) and not c.dry_run]
        self._fallback = watching[0] if watching else None
        self._new, self._open, self._running = {}, None, False

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow the recipe over this model, and refuse what cannot be."""
        plugin = _plugin(trainer)
        self._configured = plugin.precision_map.configured()
        self._course = follow(self.recipe, plugin)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin, or go on from a checkpoint."""
        self._steps = self._length(trainer)
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._restore(loaded, trainer)
        self._log = run_of(trainer).log(self)
        self._at, self._shown, self._running = trainer.global_step, -1, True

    def _length(self, trainer: L.Trainer) -> float:
        """Steps of the whole run, if a stage asks for its share of them; else inf.

        Not before the loops are restored: asking for it makes the loaders, and one that is made
        before does not get its state from the checkpoint.
        """
        asking = [stage for stage in self.recipe.stages if "share" in stage.until]
        steps = float(trainer.estimated_stepping_batches) if asking else math.inf
        if asking and not 0 < steps < math.inf:
            raise ValueError(
                f"{asking[0]}: until.share needs a run of known length; give the Trainer max_steps,"
                " or a loader that knows its length, or take until.steps"
            )
        return steps

    # -- steps ----------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps: gather, decide, and write to the table."""
        if not self._running:
            return
        if self._tokens is not None:
            self._tokens.add(batch)
        if self._open is None:
            self._safely(self._boundary, trainer)
            self._open = trainer.global_step

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take in what the step has shown."""
        if not self._running:
            return
        if self._losses is not None:
            self._losses.add(outputs)
        step = trainer.global_step
        if step == self._open:
            return
        self._open, self._at = None, step
        if self._losses is not None:
            automatic, device = pl_module.automatic_optimization, trainer.strategy.root_device
            self._losses.end_step(step, automatic=automatic, device=device)
        if self._tokens is not None:
            self._tokens.end_step(step, trainer)
        if self._shown < 0 or step // self._interval > self._shown // self._interval:
            self._show(pl_module, step)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Metrics of a validation are new."""
        metrics = self._sources.get("metrics")
        if isinstance(metrics, MetricSource) and not trainer.sanity_checking:
            metrics.validated = True

    def _show(self, pl_module: L.LightningModule, step: int) -> None:
        """The stage, to the progress bar and the loggers."""
        self._shown = step
        index = float(self._state.stage)
        pl_module.log(
            STAGE, index, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1
        )
        self._log.scalars({STAGE: index}, step)

    # -- between two steps ----------------------------------------------------------------------

    def _boundary(self, trainer: L.Trainer) -> None:
        step, plugin = trainer.global_step, _plugin(trainer)
        plugin.boundary()
        if self._rewrite is not None:  # the recipe was changed while the run lay still
            before, self._rewrite = self._rewrite, None
            name = f"rollout stage {self.stage}: the recipe was changed"
            course = self._course[self._state.stage].formats
            self._write(plugin, _own_moves(plugin.precision_map, course, before)[0], name)
        self._gather(step)
        new, self._new = self._new, {}
        held, over = self._held()
        signals = RolloutSignals(
            step=step,
            share=step / self._steps,
            tokens=None if self._tokens is None else self._tokens.total,
            values=_as_asked(self.recipe, new),
            held=held,
            over=over,
        )
        before = self._state
        self._state, decision = self._rollout.step(before, signals)
        self._tell_gates(step, before, decision.verdicts)
        if self._state.held != before.held:
            self._tell_hold(step, before.held)
        if decision.action == "stop":
            self._tell_end(step, decision.reason)
        elif decision.action != "none":
            self._enter(plugin, before, decision, signals)

    def _gather(self, step: int) -> None:
        """What callbacks have measured; nothing is lost if a checkpoint comes in between."""
        new = collect(list(self._sources.values()), step, self._state.entered)
        if self._losses is not None:
            new.update(self._losses.take())
        for name, points in new.items():
            self._new.setdefault(name, []).extend(points)

    def _held(self) -> tuple[str, str]:
        """Why no stage may begin or end now, and why none may ever again."""
        phase = "" if self._fallback is None else self._fallback.phase
        if phase == "permanent":
            return "", "PrecisionFallback has put all layers into high precision for good"
        if phase in ("suspect", "attribute", "demote"):
            return "PrecisionFallback looks into an incident", ""
        held = "PrecisionFallback has layers demoted, on probation"
        return (held if phase == "probation" else ""), ""

    def _enter(
        self,
        plugin: LayerPrecision,
        before: RolloutState,
        decision: RolloutDecision,
        signals: RolloutSignals,
    ) -> None:
        """Carry a decision out: give the stage's layers their formats."""
        entry = self._course[self._state.stage]
        known = self._course[before.stage].formats if before.stage >= 0 else self._configured
        changes, left = _own_moves(plugin.precision_map, entry.formats, known)
        action = f"{len(changes)} layers change"
        action += f", {len(left)} are left as others have set them" if left else ""
        self._log.write(
            StageChange(
                step=signals.step,
                reason=decision.reason,
                stage=entry.stage.name,
                previous="" if before.stage < 0 else self.recipe.stages[before.stage].name,
                numbers={
                    "stage": float(self._state.stage),
                    "layers_changed": float(len(changes)),
                    "layers_left": float(len(left)),
                    "fp8_share": flops_share(plugin, changes),
                    "share": signals.share or 0.0,
                    **({} if signals.tokens is None else {"tokens": float(signals.tokens)}),
                },
                layers=tuple(changes),
                action=action,
            )
        )
        self._write(plugin, changes, f"rollout stage {entry.stage.name}: {decision.reason}")
        self._log.count("stage_changes", signals.step)
        self._shown = -1
        if self._state.ended:
            self._tell_end(signals.step, self._state.ended)

    def _write(
        self, plugin: LayerPrecision, changes: Mapping[str, LinearFormat], reason: str
    ) -> None:
        """Through the table, as anybody."""
        table = plugin.precision_map
        by_format: dict[LinearFormat, list[str]] = {}
        for name, format in changes.items():
            by_format.setdefault(format, []).append(name)
        for format, names in by_format.items():
            pattern = "|".join(map(re.escape, names))
            table.set(f"re:{pattern}", format, reason=reason, author="rollout")
        plugin.boundary()

    # -- what is said ---------------------------------------------------------------------------

    def _tell_gates(self, step: int, state: RolloutState, verdicts: Sequence[GateVerdict]) -> None:
        stage = self._rollout.stage(state)
        if stage is None:
            return
        for verdict in verdicts:
            gate, passed = verdict.gate, verdict.answer == "passed"
            bounds = {"below": gate.below, "above": gate.above}
            self._log.write(
                GateResult(
                    step=step,
                    reason=verdict.sentence(),
                    stage=stage.name,
                    statistic=gate.statistic,
                    passed=passed,
                    numbers={
                        "value": verdict.value,
                        "window": float(gate.window),
                        **{name: value for name, value in bounds.items() if value is not None},
                    },
                    action="" if passed else _CONSEQUENCE[stage.on_fail, verdict.answer],
                )
            )
            if verdict.answer == "failed":
                self._log.count("gate_failures", step)

    def _tell_hold(self, step: int, before: str) -> None:
        if self._state.held:
            text = f"the rollout holds in stage {self.stage}: {self._state.held}"
        else:
            text = f"the rollout goes on in stage {self.stage}, no longer held: {before}"
        self._log.write(Note(step=step, reason=text))

    def _tell_end(self, step: int, reason: str) -> None:
        text = f"the rollout ends in stage {self.stage}: {reason}"
        self._log.write(Note(step=step, reason=text))

    def _safely(self, function: Callable[..., object], *args: Any) -> None:
        """A rollout that fails ends where it stands, and the training goes on."""
        try:
            function(*args)
        except Exception as error:
            self._running = False
            log.exception("StagedRollout failed; the training goes on in the formats of now")
            text = f"the rollout has failed in stage {self.stage}, the run goes on: {error}"
            self._log.write(Note(step=self._state.last, reason=text))

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The log is closed."""
        if stage == "fit":
            self._running = False

    # -- state ----------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Stage, evidence, counts; the recipe too, to notice on resume that it was changed."""
        if self._running and self._open is None:
            self._gather(self._at)
        if self._losses is not None:
            for name, points in self._losses.take(all=True).items():
                self._new.setdefault(name, []).extend(points)
        return {
            "version": STATE_VERSION,
            "recipe": self.recipe.to_yaml(),
            "rollout": self._rollout.state_dict(self._state),
            "new": {name: [list(point) for point in points] for name, points in self._new.items()},
            "sources": {name: source.state_dict() for name, source in self._sources.items()},
            "tokens": None if self._tokens is None else self._tokens.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls this before the model is set up: it takes effect at the start."""
        check_version(state_dict, STATE_VERSION, "StagedRollout state must have version")
        self._state = self._rollout.load_state_dict(state_dict["rollout"])
        self._loaded = state_dict

    def _restore(self, loaded: Mapping[str, Any], trainer: L.Trainer) -> None:
        for name, source in self._sources.items():
            if name in loaded["sources"]:
                source.load_state_dict(loaded["sources"][name])
        if self._tokens is not None and loaded["tokens"] is not None:
            self._tokens.load_state_dict(loaded["tokens"])
        if loaded["recipe"] == self.recipe.to_yaml():
            new: dict[str, list[list[Any]]] = loaded["new"]
            self._new = {n: [(at, value) for at, value in points] for n, points in new.items()}
            return
        old = RolloutRecipe.from_yaml(loaded["recipe"])
        self._state = replace(self._state, evidence={}, answers={})
        if self.stage is not None:
            formats = follow(old, _plugin(trainer))[old.index(self.stage)].formats
            self._rewrite = formats


_CONSEQUENCE = {
    ("hold", "failed"): "the stage goes on until it passes",
    ("step_back", "failed"): "one stage back",
    ("stop", "failed"): "the rollout ends here",
    ("hold", "no data"): "the stage goes on until it is measured",
    ("step_back", "no data"): "the stage goes on until it is measured",
    ("stop", "no data"): "the stage goes on until it is measured",
}
"""What follows when a gate does not pass, by `on_fail` and the gate's answer."""


def follow(recipe: RolloutRecipe, plugin: LayerPrecision) -> list[StageFormats]:
    """A recipe's formats by stage over the layers of a plugin's table.

    Args:
        recipe: the recipe.
        plugin: the plugin, when its table is filled.

    Raises:
        ValueError: for a pattern that matches nothing, a layer that cannot run a stage's format,
            or where nothing can be moved.
    """
    table = plugin.precision_map
    configured = table.configured()
    formats = {name: table.known_format(format) for name, format in configured.items()}
    low = [name for name, format in formats.items() if not format.is_high_precision]
    # Without a layer in FP8 it is FP16 that a recipe moves, between itself and BF16.
    high = (plugin.base_format if low else plugin.high_precision).name
    half = configured if plugin.falls_back_whole else {}
    movable = low or [name for name, format in half.items() if format != high]
    if not movable:
        raise ValueError(
            f"recipe {recipe.name!r} has nothing to move: {type(plugin).__name__} is configured to"
            " leave every layer in high precision; configure it with the formats that the run is"
            " to come to"
        )
    stages = formats_by_stage(recipe, configured, high=high, movable=movable)
    for entry in stages:
        for name in entry.changes:
            format = table.known_format(entry.formats[name])
            if not table.can_run(table.layers[name], format):
                raise ValueError(f"{entry.stage}: layer {name!r} cannot run {format.name!r} here")
        if not low and len(set(entry.formats.values())) > 1:
            raise ValueError(
                f"{entry.stage}: layers must all have one format under {type(plugin).__name__},"
                " whose base changes with them; write '*'"
            )
    return stages


def _own_moves(
    table: PrecisionMap, wanted: Mapping[str, str], before: Mapping[str, str]
) -> tuple[dict[str, LinearFormat], list[str]]:
    """Which layers a stage moves.

    Args:
        table: the formats.
        wanted: those to be.
        before: those that the rollout itself had seen to: a layer that has another one now was
            changed by somebody else, who knows why, and may only go to high precision.

    Returns:
        The new formats of the layers that get one, and the layers that are left as they are.
    """
    moves: dict[str, LinearFormat] = {}
    left: list[str] = []
    for name, layer in table.layers.items():
        now, format = layer.format, table.known_format(wanted[name])
        if now == format:
            continue
        own = now == table.known_format(before[name])
        if own or (format.is_high_precision and not now.is_high_precision):
            moves[name] = format
        elif before[name] != wanted[name]:
            left.append(name)
    return moves, left


def _as_asked(recipe: RolloutRecipe, new: Points) -> Points:
    """Values by the names that gates call them by."""
    named = {gate.statistic: statistic(gate) for stage in recipe.stages for gate in stage.gates}
    return {asked: new[name] for asked, name in {**named, LOSS: LOSS}.items() if name in new}


def _plugin(trainer: L.Trainer) -> LayerPrecision:
    plugin = trainer.precision_plugin
    if not isinstance(plugin, LayerPrecision):
        raise ValueError(
            "StagedRollout needs a precision plugin of lightning_fp, got"
            f" {type(plugin).__name__}; use Trainer(plugins=FP8Precision(...),"
            " callbacks=[StagedRollout(...)])"
        )
    return plugin
