"""Rollout recipes: list and show the built-in ones, check one's own, print the JSON schema."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from lightning_fp import recipes
from lightning_fp.cli.loading import load_model
from lightning_fp.cli.output import console, table
from lightning_fp.kernels.hardware import cuda_has_fp8
from lightning_fp.layers import Conversion, ConversionReport, PrecisionMap, convert_into
from lightning_fp.layers.format import linear_format
from lightning_fp.layers.scaling import read_scaling
from lightning_fp.recipes import RolloutRecipe, Stage, StageFormats
from lightning_fp.recipes.text import as_plain

_HIGH = "bf16"
"""What high precision is, as long as there is no plugin to ask."""

_NAMED = 4
"""Layers that a line names; of more it gives the number."""


def add_arguments(parser: ArgumentParser) -> None:
    """One subcommand for each question."""
    questions = parser.add_subcommands(dest="question", required=True)
    every = ArgumentParser(description="The built-in recipes, a line each.")
    questions.add_subcommand("list", every, help="the built-in recipes")
    show = ArgumentParser(description="A built-in recipe as YAML, to copy and change.")
    show.add_argument("name", type=str, help=", ".join(recipes.names()))
    questions.add_subcommand("show", show, help="one of them as YAML, to copy and change")
    check = ArgumentParser(description="What a recipe does, and what is wrong with it.")
    check.add_argument("file", type=str, help="a YAML file, or the name of a built-in recipe")
    check.add_argument(
        "--model",
        type=str,
        default=None,
        metavar="FACTORY",
        help="package.module:factory or path/to/file.py:factory: which of its layers each stage"
        " touches",
    )
    check.add_argument(
        "--scaling",
        type=str,
        default="fp8-dynamic",
        help="with --model: the scaling that the plugin will be configured with",
    )
    check.add_argument("--json", action="store_true", help="print JSON, with all layers")
    questions.add_subcommand("check", check, help="what a recipe does, and what is wrong with it")
    schema = ArgumentParser(description="The JSON schema of recipes, for editors.")
    questions.add_subcommand("schema", schema, help="the JSON schema, for editors")


def run(question: str, **options: Any) -> int:
    """Answer one question.

    Raises:
        ValueError: for a recipe that is none, or that the model contradicts.
    """
    asked: Mapping[str, Any] = vars(options[question])
    if question == "list":
        grid = table("", "recipe", "stages", "what it does")
        for name in recipes.names():
            recipe = recipes.get(name)
            grid.add_row(name, " > ".join(s.name for s in recipe.stages), recipe.description)
        console().print(grid)
    elif question == "show":
        print(recipes.get(asked["name"]).to_yaml(), end="")
    elif question == "schema":
        print(json_module.dumps(recipes.json_schema(), indent=2))
    else:
        _check(asked["file"], asked["model"], asked["scaling"], json=asked["json"])
    return 0


def _check(file: str, model: str | None, scaling: str, *, json: bool) -> None:
    recipe = recipes.read(file)
    if model is None:
        if json:
            print(json_module.dumps({"recipe": as_plain(recipe)}, indent=2))
            return
        _print_stages(recipe)
        console().print("The recipe is sound. Which layers it touches: --model module:factory")
        return
    user = load_model(model)
    precision_map = PrecisionMap(cuda_fp8=cuda_has_fp8())
    conversion = Conversion(
        format=read_scaling(scaling).format,
        rules=(),
        backend="auto",
        high_precision=linear_format(_HIGH),
        cuda_fp8=cuda_has_fp8(),
    )
    report = convert_into(precision_map, user.model, conversion)
    try:
        stages = follow(recipe, precision_map.configured())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    remarks = list(remarks_on(stages))
    if json:
        course = [_as_json(entry, report) for entry in stages]
        found = {"recipe": as_plain(recipe), "course": course, "remarks": remarks}
        print(json_module.dumps(found, indent=2))
        return
    _print_stages(recipe)
    _print_course(stages, report)
    for remark in remarks:
        console().print(f"Note: {remark}", markup=False, soft_wrap=True)


def follow(recipe: RolloutRecipe, configured: Mapping[str, str]) -> list[StageFormats]:
    """A recipe's course over a converted model.

    Args:
        recipe: the recipe.
        configured: the configured format of each layer.

    Raises:
        ValueError: for a pattern that matches nothing.
    """
    low = [n for n, f in configured.items() if not linear_format(f).is_high_precision]
    return recipes.formats_by_stage(recipe, configured, high=_HIGH, movable=low or None)


def remarks_on(stages: Sequence[StageFormats]) -> list[str]:
    """What is no mistake, and perhaps not meant either: rules and stages without effect.

    Args:
        stages: the recipe's course.
    """
    remarks: list[str] = []
    for i, entry in enumerate(stages):
        for pattern in entry.idle:
            remarks.append(
                f"{entry.stage}: pattern {pattern!r} decides about no layer of this model"
            )
        if i and not entry.changes:
            remarks.append(f"{entry.stage}: changes nothing, all layers keep their formats")
    return remarks


def _print_stages(recipe: RolloutRecipe) -> None:
    grid = table(recipe.name, "stage", "layers", "until", "gates", "if one fails")
    for stage in recipe.stages:
        gates = "\n".join(f"{g.statistic} {g.bounds} over {g.window}" for g in stage.gates)
        layers = "\n".join(f"{pattern}: {format}" for pattern, format in stage.layers.items())
        fails = stage.on_fail.replace("_", " ") if stage.gates else ""
        if stage.on_fail == "step_back":
            fails += f", {stage.max_tries} tries"
        grid.add_row(_plain(stage.name), _plain(layers), _until(stage), _plain(gates), fails)
    console().print(grid)


def _until(stage: Stage) -> str:
    if stage.is_open_ended:
        return "the end"
    if not stage.until:
        return "its gates pass" if stage.on_fail != "step_back" else "the end"
    return ", ".join(f"{name} {value:,}" for name, value in stage.until.items())


def _print_course(stages: Sequence[StageFormats], report: ConversionReport) -> None:
    columns = ("stage", "formats", "low precision", "changes")
    grid = table("", *columns, right=("low precision",))
    for entry in stages:
        counts: dict[str, int] = {}
        for format in entry.formats.values():
            counts[format] = counts.get(format, 0) + 1
        formats = "\n".join(f"{count} layers {format}" for format, count in counts.items())
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
