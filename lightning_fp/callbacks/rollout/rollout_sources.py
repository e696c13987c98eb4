"""Where a rollout's gates get their statistics from: the callbacks that measure them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeAlias

import lightning as L
import torch

from lightning_fp.callbacks.clamp.clamp_monitor import ClampMonitor
from lightning_fp.callbacks.clamp.summary import summary
from lightning_fp.callbacks.compare.evaluation_gap import EvaluationGap
from lightning_fp.callbacks.compare.parity_probe import ParityProbe
from lightning_fp.callbacks.fallback.precision_fallback import PrecisionFallback
from lightning_fp.callbacks.mismatch.mismatch_monitor import MismatchMonitor
from lightning_fp.recipes import Gate, RolloutRecipe
from lightning_fp.records import StatisticsRows
from lightning_fp.records.tables import SCHEMA
from lightning_fp.stability import Parity

Points: TypeAlias = "dict[str, list[tuple[int, float]]]"
"""New values by statistic, with the number of optimizer steps done when they were measured."""

FALLBACKS, EVAL_GAP, LOSS, LOSS_GAP = "fallbacks", "eval_gap", "loss", "loss_gap"

_SUMMARIES = (
    "clamped_mass/max",
    "clamped_mass/mean",
    "underflow/max",
    "underflow/mean",
    "sqnr_db/min",
    "headroom_bits/min",
)
_REDUCE = {"max": torch.amax, "min": torch.amin, "mean": torch.mean}
_COLUMNS = [f"{name}/{how}" for name in SCHEMA.names[4:] for how in _REDUCE]
_PARITY = [f.name for f in fields(Parity) if f.type in ("float", float)]


class Source(ABC):
    """Gives the statistics of some gates, alike on all ranks."""

    @abstractmethod
    def take(self, step: int, entered: int) -> Points:
        """What is new; call it at every step, on all ranks.

        Args:
            step: optimizer steps so far.
            entered: the step at which the stage began: what reaches back further is left out.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on the same."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        return


class MonitorSource(Source):
    """ClampMonitor's rows, at each of its log intervals.

    Args:
        monitor: the callback.
        statistics: names of its summary, or columns with "/max", "/min" or "/mean" over all
            operands in low precision.
    """

    def __init__(self, monitor: ClampMonitor, statistics: Collection[str]) -> None:
        self._monitor, self._statistics = monitor, statistics
        self._seen, self._before = monitor.latest, 0

    def take(self, step: int, entered: int) -> Points:
        rows = self._monitor.latest
        if rows is None or rows is self._seen:
            return {}
        began, self._seen, self._before = self._before, rows, step
        if began < entered:  # partly in the formats of another stage
            return {}
        summed = summary(rows)
        return {name: [(step, _of_rows(rows, summed, name))] for name in self._statistics}

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._before = state["before"]


def _of_rows(rows: StatisticsRows, summed: Mapping[str, float], name: str) -> float:
    if name in _SUMMARIES:
        return summed[f"fp8/{name}"]
    column, _, how = name.rpartition("/")
    if column not in rows.values:
        return math.nan
    values = rows.values[column][rows.low_precision].double()
    known = values[~torch.isnan(values)]
    return float(_REDUCE[how](known)) if len(known) else math.nan


class ParitySource(Source):
    """ParityProbe's results.

    Args:
        probe: the callback.
        statistics: "parity/" and a field of `Parity`.
    """

    def __init__(self, probe: ParityProbe, statistics: Collection[str]) -> None:
        self._probe, self._statistics = probe, statistics
        self._seen = set(probe.results)

    def take(self, step: int, entered: int) -> Points:
        new = {at: parity for at, parity in self._probe.results.items() if at not in self._seen}
        self._seen.update(new)
        return {
            name: [(at, float(getattr(p, name.removeprefix("parity/")))) for at, p in new.items()]
            for name in self._statistics
        }


class FallbackSource(Source):
    """At every step how many incidents ended in a demotion.

    Args:
        fallback: the callback.
    """

    def __init__(self, fallback: PrecisionFallback) -> None:
        self._fallback = fallback
        self._before: int | None = None

    def take(self, step: int, entered: int) -> Points:
        now = self._fallback._state.demotions
        new = 0 if self._before is None else now - self._before
        self._before = now
        return {FALLBACKS: [(step, float(new))]}

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._before = state["before"]


class EvaluationSource(Source):
    """EvaluationGap's rows.

    Args:
        evaluation: the callback.
    """

    def __init__(self, evaluation: EvaluationGap) -> None:
        self._evaluation, self._seen = evaluation, evaluation.latest

    def take(self, step: int, entered: int) -> Points:
        row = self._evaluation.latest
        if row is None or row is self._seen:
            return {}
        self._seen = row
        return {EVAL_GAP: [(step, row.gap)]}


class MismatchSource(Source):
    """MismatchMonitor's metrics.

    Args:
        monitor: the callback.
        statistics: "mismatch/" and the name of a metric.
    """

    def __init__(self, monitor: MismatchMonitor, statistics: Collection[str]) -> None:
        self._monitor, self._statistics = monitor, statistics
        self._seen = monitor.latest

    def take(self, step: int, entered: int) -> Points:
        metrics = self._monitor.latest
        if metrics is None or metrics is self._seen:
            return {}
        self._seen = metrics
        return {
            name: [(step, float(metrics.get(name.removeprefix("mismatch/"), math.nan)))]
            for name in self._statistics
        }


class MetricSource(Source):
    """What the module logs, read once per log interval and after each validation.

    What is logged in training counts at every reading. Of a validation's metrics, which Lightning
    goes on showing, a value counts when it is another than the one before.

    Args:
        trainer: the Trainer, whose `callback_metrics` are read.
        statistics: their names.
        interval: steps from one reading to the next.
    """

    def __init__(self, trainer: L.Trainer, statistics: Collection[str], interval: int) -> None:
        self._trainer, self._statistics, self._interval = trainer, statistics, interval
        self._read_at = 0
        self._seen: dict[str, float] = {}
        self.validated = False
        """Whether a validation has ended since the last reading."""

    def take(self, step: int, entered: int) -> Points:
        due = step // self._interval > self._read_at // self._interval
        if not (due or self.validated):
            return {}
        began, self._read_at, self.validated = self._read_at, step, False
        new: Points = {}
        results: Any = self._trainer.fit_loop._results
        logged = {metric.meta.name for metric in results.values()}
        for name, value in self._over_ranks().items():
            fresh = name.removesuffix("_step") in logged or value != self._seen.get(name)
            if fresh and not math.isnan(value):
                self._seen[name] = value
                if began >= entered:
                    new[name] = [(step, value)]
        return new

    def _over_ranks(self) -> dict[str, float]:
        """Means over the ranks that have a value; NaN where none has."""
        metrics: Mapping[str, Any] = self._trainer.callback_metrics
        values = [float(metrics.get(name, math.nan)) for name in self._statistics]
        if self._trainer.world_size > 1:
            device = self._trainer.strategy.root_device
            here = torch.tensor(values, dtype=torch.float64, device=device)
            known = ~torch.isnan(here)
            sums = torch.stack([torch.where(known, here, 0.0), known.double()])
            total, ranks = self._trainer.strategy.reduce(sums, reduce_op="sum")
            values = (total / ranks).tolist()
        return dict(zip(self._statistics, values, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"read_at": self._read_at, "seen": dict(self._seen), "validated": self.validated}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._read_at, self.validated = state["read_at"], state["validated"]
        self._seen = dict(state["seen"])


# -- which gate needs what --------------------------------------------------------------------


def statistic(gate: Gate) -> str:
    """A gate's statistic without the prefixes that loggers show it with."""
    return gate.statistic.removeprefix("fp8/").removeprefix("precision/")


def find_sources(recipe: RolloutRecipe, trainer: L.Trainer, interval: int) -> dict[str, Source]:
    """The sources of all statistics that a recipe's gates ask for, but the loss.

    Args:
        recipe: the recipe.
        trainer: the Trainer with its callbacks.
        interval: steps from one reading of logged metrics to the next.

    Raises:
        ValueError: if the callback is missing that measures a statistic, or measures it too
            rarely, naming the stage, the gate and the line to add.
    """
    callbacks: list[Any] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    wanted: dict[type[Any] | None, list[str]] = {}
    for stage in recipe.stages:
        for gate in stage.gates:
            name = statistic(gate)
            if name in (LOSS, LOSS_GAP):
                continue
            owner = _owner(name)
            found = next((c for c in callbacks if owner is not None and isinstance(c, owner)), None)
            if owner is not None:
                _check(f"{stage}: {gate}", gate, owner, found, interval)
            names = wanted.setdefault(owner, [])
            if name not in names:
                names.append(name)

    def one(owner: type[Any]) -> Any:
        return next(c for c in callbacks if isinstance(c, owner))

    sources: dict[str, Source] = {}
    for owner, names in wanted.items():
        if owner is ClampMonitor:
            sources["monitor"] = MonitorSource(one(ClampMonitor), names)
        elif owner is ParityProbe:
            sources["parity"] = ParitySource(one(ParityProbe), names)
        elif owner is PrecisionFallback:
            sources["fallback"] = FallbackSource(one(PrecisionFallback))
        elif owner is EvaluationGap:
            sources["evaluation"] = EvaluationSource(one(EvaluationGap))
        elif owner is MismatchMonitor:
            sources["mismatch"] = MismatchSource(one(MismatchMonitor), names)
        else:
            sources["metrics"] = MetricSource(trainer, names, interval)
    return sources


def _owner(name: str) -> type[Any] | None:
    """The callback that measures a statistic; None for what the module logs."""
    if name in _SUMMARIES or name in _COLUMNS:
        return ClampMonitor
    if name.startswith("parity/"):
        return ParityProbe
    if name.startswith("mismatch/"):
        return MismatchMonitor
    return {FALLBACKS: PrecisionFallback, EVAL_GAP: EvaluationGap}.get(name)


def _check(where: str, gate: Gate, owner: type[Any], found: Any, interval: int) -> None:
    """Refuse a gate that nobody can answer."""
    name = statistic(gate)
    what_if = name.startswith("what_if_")
    call = f"{owner.__name__}({'what_if=True' if what_if else ''})"
    if found is None:
        raise ValueError(f"{where} needs {call}; add it to Trainer(callbacks=[...])")
    if isinstance(found, ClampMonitor):
        if what_if and not found.what_if:
            raise ValueError(f"{where} needs {call}, got ClampMonitor(what_if=False)")
        _check_period(where, gate, "ClampMonitor logs", found.log_every_n_steps or interval)
    if isinstance(found, ParityProbe):
        field = name.removeprefix("parity/")
        if field not in _PARITY:
            known = _listed(f"parity/{field}" for field in _PARITY)
            raise ValueError(f"{where}: statistic must be one of {known}, got {name!r}")
        _check_period(where, gate, "ParityProbe probes", found._every_n_steps)


def _check_period(where: str, gate: Gate, who: str, period: int) -> None:
    if gate.window < period:
        raise ValueError(
            f"{where}: window must be at least {period}, got {gate.window}: {who} once in"
            f" {period} steps; let it do so more often, or take a longer window"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def collect(sources: Sequence[Source], step: int, entered: int) -> Points:
    """What is new in all sources; see `Source.take`."""
    points: Points = {}
    for source in sources:
        points.update(source.take(step, entered))
    return points
