"""Which measurement each gate of a recipe reads in a plain loop, and whether it can ever come."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from lightning_fp.layers import LinearFormat, PrecisionMap
from lightning_fp.recipes import Gate, RolloutRecipe, StageFormats
from lightning_fp.telemetry import LOSS
from lightning_fp.telemetry.casts.summary import COLUMNS, SUMMARIES, why_nothing
from lightning_fp.telemetry.parity_log import PUBLISHED
from lightning_fp.telemetry.rollout.gate_evidence import LOSS_GAP
from lightning_fp.telemetry.stability import signals

FALLBACKS = "fallbacks"
"""Published at every step: how many incidents have ended in a demotion since the one before."""

_OPTIONS: Mapping[str, Collection[str]] = {
    "monitor": (*SUMMARIES, *COLUMNS),
    "fallback": (FALLBACKS,),
    "mismatch": ("mismatch/",),
    "parity": PUBLISHED,
    "stability": signals.PUBLISHED,
}
"""By the option of `PrecisionLoop` that measures them, names on the board, or what they begin with.
"""


def measurements(recipe: RolloutRecipe, options: Mapping[str, int]) -> dict[str, str]:
    """By each gate's statistic the name of its measurement on the board.

    What no option measures has the name under which the loop is to publish it: `loop.log(name, x)`.

    Args:
        recipe: the recipe.
        options: those that are on, of "monitor", "fallback", "mismatch", "parity" and "stability",
            with the steps from one measurement to the next.

    Raises:
        ValueError: naming the stage, the gate, and the option that it asks for.
    """
    names: dict[str, str] = {}
    for stage in recipe.stages:
        for gate in stage.gates:
            option, name = _owner(gate)
            where = f"{stage}: {gate}"
            if name == LOSS_GAP:
                raise ValueError(
                    f"{where} compares with a recorded run, which a plain loop has not; leave the"
                    " gate out, or take a gate on 'loss'"
                )
            if option and option not in options:
                raise ValueError(f"{where} needs {option}=True; give PrecisionLoop({option}=True)")
            period = options.get(option, 1)
            if gate.window < period:
                raise ValueError(
                    f"{where}: window must be at least {period}, got {gate.window}: {option}"
                    f" measures once in {period} steps; let it do so more often, or take a longer"
                    " window"
                )
            names[gate.statistic] = name
    return names


def check_measurable(stages: Sequence[StageFormats], table: PrecisionMap) -> None:
    """Refuse gates that would hold the rollout for ever, because nothing can be measured for them.

    Raises:
        ValueError: naming the stage, the gate, and why.
    """
    for entry in stages:
        if entry.skipped:
            continue
        formats: set[LinearFormat] = {table.known[format] for format in entry.formats.values()}
        for gate in entry.stage.gates:
            option, name = _owner(gate)
            why = why_nothing(name, formats) if option == "monitor" else ""
            if why:
                raise ValueError(
                    f"{entry.stage}: {gate} can never be measured there: {why}; move the gate to a"
                    " stage in which it can, or leave it out"
                )


def _owner(gate: Gate) -> tuple[str, str]:
    """The option that measures a gate's statistic, "" if the loop's owner does; and its name."""
    asked = gate.statistic.removeprefix("fp8/").removeprefix("precision/")
    if asked in (LOSS, LOSS_GAP):
        return "", asked
    for option, names in _OPTIONS.items():
        for name in (asked, f"fp8/{asked}", f"precision/{asked}"):
            if name in names or any(x.endswith("/") and name.startswith(x) for x in names):
                return option, name
    return "", asked
