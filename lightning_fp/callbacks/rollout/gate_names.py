"""Which measurement each gate of a recipe reads, and whether anybody publishes it.

A gate without data holds the rollout. One whose data can never come would hold it for ever, unseen
until somebody wonders after hours why the run is still in BF16. So whatever can be known of that at
the start is refused there, with the line to add: a callback that is missing, measures too rarely,
or has nothing to measure in that stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_fp.callbacks.clamp.clamp_monitor import ClampMonitor
from lightning_fp.callbacks.compare.evaluation_gap import EvaluationGap
from lightning_fp.callbacks.compare.parity_probe import ParityProbe
from lightning_fp.callbacks.fallback.precision_fallback import PrecisionFallback
from lightning_fp.callbacks.mismatch.mismatch_monitor import MismatchMonitor
from lightning_fp.callbacks.run.run import RunCallback
from lightning_fp.callbacks.stability.stability_monitor import StabilityMonitor
from lightning_fp.choices import near_names, unknown
from lightning_fp.layers import PrecisionMap
from lightning_fp.recipes import Gate, RolloutRecipe, StageFormats
from lightning_fp.telemetry import LOSS
from lightning_fp.telemetry.rollout.gate_evidence import LOSS_GAP

PUBLISHERS: tuple[type[RunCallback], ...] = (
    ClampMonitor,
    ParityProbe,
    PrecisionFallback,
    EvaluationGap,
    MismatchMonitor,
    StabilityMonitor,
)
"""The callbacks whose measurements gates read, for the line to add where one is missing."""

_ALIKE = 0.85
"""How much a name must look like one of ours to be taken for a mistake."""

_PREFIXES = ("", "fp8/", "precision/")
"""A gate may leave out what loggers have before a name."""


def statistic(gate: Gate) -> str:
    """A gate's statistic without the prefixes that loggers show it with."""
    return gate.statistic.removeprefix("fp8/").removeprefix("precision/")


def measurements(recipe: RolloutRecipe, trainer: L.Trainer, interval: int) -> dict[str, str]:
    """By each gate's statistic the name of its measurement on the board.

    What no callback of this package measures has the name under which the module is to log it.

    Args:
        recipe: the recipe.
        trainer: the Trainer with its callbacks.
        interval: its log interval, in steps.

    Raises:
        ValueError: if the callback is missing that measures a statistic, or measures it too
            rarely, naming the stage, the gate and the line to add.
    """
    callbacks: list[L.Callback] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    names: dict[str, str] = {}
    for stage in recipe.stages:
        for gate in stage.gates:
            asked = statistic(gate)
            owner = _owner(asked)
            if owner is None:
                _check_family(f"{stage}: {gate}", asked)
                _say_if_misspelled(f"{stage}: {gate}", asked)
                names[gate.statistic] = asked
                continue
            publisher, name, option = owner
            found = next((c for c in callbacks if isinstance(c, publisher)), None)
            _check(f"{stage}: {gate}", gate, publisher, found, option, interval)
            names[gate.statistic] = name
    return names


def check_measurable(
    stages: Sequence[StageFormats], trainer: L.Trainer, table: PrecisionMap
) -> None:
    """Refuse gates that would hold the rollout for ever, because nothing can be measured for them.

    Args:
        stages: the recipe over the model.
        trainer: the Trainer with its callbacks, at the start of a fit.
        table: the table of formats.

    Raises:
        ValueError: naming the stage, the gate, and why.
    """
    callbacks: list[L.Callback] = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    for entry in stages:
        if entry.skipped:
            continue
        formats = {table.known[format] for format in entry.formats.values()}
        for gate in entry.stage.gates:
            publisher, name, _ = _owner(statistic(gate)) or (None, "", "")
            found = next((c for c in callbacks if publisher and isinstance(c, publisher)), None)
            why = "" if found is None else found.cannot_measure(name, trainer, formats)
            if why:
                raise ValueError(
                    f"{entry.stage}: {gate} can never be measured there: {why}; move the gate to a"
                    " stage in which it can, or leave it out"
                )


def is_published(name: str) -> bool:
    """Whether a name on the board is filled by the run or a callback of this package."""
    return name in (LOSS, LOSS_GAP) or _owner(name) is not None


def _owner(asked: str) -> tuple[type[RunCallback], str, str] | None:
    """Who publishes a statistic, its name on the board, and the option that it takes."""
    for publisher in PUBLISHERS:
        for name in (prefix + asked for prefix in _PREFIXES):
            for published, option in publisher.publishes.items():
                if fnmatchcase(name, published):
                    return publisher, name, option
    return None


def _check(
    where: str,
    gate: Gate,
    publisher: type[RunCallback],
    found: RunCallback | None,
    option: str,
    interval: int,
) -> None:
    """Refuse a gate that nobody can answer."""
    call = f"{publisher.__name__}({option})"
    if found is None:
        raise ValueError(f"{where} needs {call}; add it to Trainer(callbacks=[...])")
    field = option.partition("=")[0]
    if option and not getattr(found, field):
        given = f"{publisher.__name__}({field}={getattr(found, field)})"
        raise ValueError(f"{where} needs {call}, got {given}")
    period, verb = found.published_every(interval)
    if gate.window < period:
        raise ValueError(
            f"{where}: window must be at least {period}, got {gate.window}:"
            f" {publisher.__name__} {verb} once in {period} steps; let it do so more often, or take"
            " a longer window"
        )


def _check_family(where: str, asked: str) -> None:
    """Refuse a name that only one callback can mean, and that it does not publish."""
    family = asked.partition("/")[0]
    for publisher in PUBLISHERS:
        known = list(_short(publisher.publishes))
        if {name.partition("/")[0] for name in known} == {family} and "/" in asked:
            raise unknown(f"{where}: statistic", asked, known)


def _say_if_misspelled(where: str, asked: str) -> None:
    """A name that nobody here publishes must be one that the module logs; or it is a mistake."""
    known = [name for publisher in PUBLISHERS for name in _short(publisher.publishes)]
    known += [LOSS, LOSS_GAP]
    near = near_names(asked, known, 1, cutoff=_ALIKE)
    if near and asked not in known:
        rank_zero_warn(
            f"{where}: no callback measures {asked!r}, so that the module must log it; did you mean"
            f" {near[0]!r}?"
        )


def _short(publishes: Mapping[str, str]) -> Iterator[str]:
    for name in publishes:
        yield name.removeprefix("fp8/").removeprefix("precision/")
