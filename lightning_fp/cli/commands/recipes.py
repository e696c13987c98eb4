"""Rollout recipes: list and show the built-in ones, check one's own, print the JSON schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_fp import recipes
from lightning_fp.cli.commands.plan import planned
from lightning_fp.cli.loading import load_model
from lightning_fp.cli.output import console, print_json
from lightning_fp.counting import counted
from lightning_fp.layers import ConversionReport, linear_format
from lightning_fp.recipes import RolloutRecipe, Stage, StageFormats
from lightning_fp.recipes.text import as_plain
from lightning_fp.terminal import FittedTable

_HIGH = "bf16"
"""What high precision is, as long as there is no plugin to ask."""

_NAMED = 4
"""Layers that a line names; of more it gives the number."""


def show(name: str) -> int:
    """Print a built-in recipe as YAML.

    Raises:
        ValueError: if there is no such recipe.
    """
    print(recipes.get(name).to_yaml(), end="")
    return 0


def schema() -> int:
    """Print the JSON schema of recipes."""
    print_json(recipes.json_schema())
    return 0


def check(file: str, model: str | None, scaling: str, *, json: bool) -> int:
    """Print what a recipe does, and to a model's layers.

    Raises:
        ValueError: for a recipe that is none, or that the model contradicts.
    """
    recipe = recipes.read(file)
    if model is None:
        if json:
            print_json({"recipe": as_plain(recipe)})
            return 0
        _print_stages(recipe)
        console().print("The recipe is sound. Which layers it touches: --model module:factory")
        return 0
    report = planned(load_model(model).model, scaling)
    configured = report.precision_map.configured()
    try:
        stages = follow(recipe, configured, order=report.order)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    remarks = _remarks(recipe, stages, configured, report)
    if json:
        course = [_as_json(entry, report) for entry in stages]
        print_json({"recipe": as_plain(recipe), "course": course, "remarks": remarks})
        return 0
    _print_stages(recipe)
    _print_course(stages, report)
    for remark in remarks:
        console().print(f"Note: {remark}", markup=False, highlight=False)
    return 0


def follow(
    recipe: RolloutRecipe, configured: Mapping[str, str], *, order: Sequence[str] = ()
) -> list[StageFormats]:
    """A recipe's course over a converted model.

    Args:
        recipe: the recipe.
        configured: the configured format of each layer.
        order: layers in the order in which they run, if that is known.

    Raises:
        ValueError: for a pattern that matches nothing.
    """
    low = [n for n, f in configured.items() if not linear_format(f).is_high_precision]
    return recipes.formats_by_stage(
        recipe, configured, high=_HIGH, movable=low or None, order=order
    )


def _remarks(
    recipe: RolloutRecipe,
    stages: Sequence[StageFormats],
    configured: Mapping[str, str],
    report: ConversionReport,
) -> list[str]:
    """What is no mistake, and perhaps not meant either."""
    idle = [
        f"{entry.stage}: pattern {pattern!r} decides about no layer of this model"
        for entry in stages
        for pattern in entry.idle
    ]
    never = recipes.never_low(recipe, stages, configured)
    told = recipes.remarks_on(recipe, stages, order_known=bool(report.order))
    return [*told, *idle, *([never] if never else [])]


def _print_stages(recipe: RolloutRecipe) -> None:
    grid = FittedTable(recipe.name, "stage", "layers", "until")
    for stage in recipe.stages:
        gates = [f"and {g.statistic} {g.bounds} over {g.window}" for g in stage.gates]
        layers = "\n".join(f"{pattern}: {format}" for pattern, format in stage.layers.items())
        fails = [f"if a gate fails: {_fails(stage)}"] if stage.gates else []
        until = "\n".join([_until(stage), *gates, *fails])
        grid.add_row(_plain(stage.name), _plain(layers), _plain(until))
    console().print(grid)


def _fails(stage: Stage) -> str:
    tries = f", {stage.max_tries} tries" if stage.on_fail == "step_back" else ""
    return stage.on_fail.replace("_", " ") + tries


def _until(stage: Stage) -> str:
    if stage.is_open_ended:
        return "the end"
    if not stage.until:
        return "its gates pass" if stage.on_fail != "step_back" else "the end"
    return ", ".join(f"{name} {value:,}" for name, value in stage.until.items())


def _print_course(stages: Sequence[StageFormats], report: ConversionReport) -> None:
    columns = ("stage", "formats", "low precision", "changes")
    grid = FittedTable("", *columns, right=("low precision",))
    for entry in stages:
        counts: dict[str, int] = {}
        for format in entry.formats.values():
            counts[format] = counts.get(format, 0) + 1
        formats = "\n".join(
            f"{counted(count, 'layer')} {format}" for format, count in counts.items()
        )
        share = f"{_low_share(entry, report):.1%}"
        grid.add_row(
            _plain(entry.stage.name), _plain(formats), share, _plain(_listed(entry.changes))
        )
    console().print(grid)


def _plain(text: str) -> str:
    """Square brackets are markup to rich, and blocks to us."""
    return text.replace("[", r"\[")


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    shown = "\n".join(names[:_NAMED])
    return f"{shown}\nand {len(names) - _NAMED} more" if len(names) > _NAMED else shown


def _low_share(entry: StageFormats, report: ConversionReport) -> float:
    """Share of the model's FLOPs in low precision in a stage."""
    low = {n for n, f in entry.formats.items() if not linear_format(f).is_high_precision}
    return sum(layer.flops_share for layer in report.layers if layer.name in low)


def _as_json(entry: StageFormats, report: ConversionReport) -> dict[str, Any]:
    return {
        "stage": entry.stage.name,
        "formats": dict(entry.formats),
        "changes": list(entry.changes),
        "low_precision_share": _low_share(entry, report),
        "idle_patterns": list(entry.idle),
    }
