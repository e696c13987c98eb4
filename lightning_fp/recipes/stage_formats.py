"""A recipe over a model: which layer has which format in each of its stages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lightning_fp.layers.rules import no_match_message
from lightning_fp.recipes.blocks import matching, stacks
from lightning_fp.recipes.recipe import RolloutRecipe
from lightning_fp.recipes.stage import CONFIGURED, Stage


@dataclass(frozen=True, kw_only=True)
class StageFormats:
    """What one stage does to a model."""

    stage: Stage

    formats: Mapping[str, str]
    """Every layer's format in the stage, by name."""

    changes: tuple[str, ...]
    """The layers whose format is another than in the stage before."""

    idle: tuple[str, ...]
    """Patterns that decide about no layer: those before take all that they match."""


def formats_by_stage(
    recipe: RolloutRecipe,
    configured: Mapping[str, str],
    *,
    high: str,
    movable: Collection[str] | None = None,
) -> list[StageFormats]:
    """Follow a recipe through its stages.

    Every stage changes what its patterns match, and leaves the rest as the stage before had it.

    Args:
        recipe: the recipe.
        configured: the format that the plugin's configuration gives each layer, in the order of
            the model.
        high: the name of high precision's format, "bf16" as a rule.
        movable: the layers that a recipe moves; by default all whose configured format is another
            than `high`. The others stay as configured: the configuration says which layers take
            part, the recipe when.

    Returns:
        One entry for each stage.

    Raises:
        ValueError: for a pattern that matches no layer, naming the stage.
    """
    names = list(configured)
    if movable is None:
        movable = {name for name, format in configured.items() if format != high}
    formats = dict(configured)
    result: list[StageFormats] = []
    for stage in recipe.stages:
        before, decided, idle = dict(formats), set[str](), list[str]()
        for pattern, format in stage.layers.items():
            matched = matching(pattern, names)
            if not matched and not _could_match(pattern, names):
                raise ValueError(f"{stage}: layers: {_no_match(pattern, names)}")
            mine = [name for name in matched if name not in decided]
            decided.update(mine)
            if not mine:
                idle.append(pattern)
            for name in mine:
                if name in movable:
                    chosen = {CONFIGURED: configured[name], "high": high}.get(format, format)
                    formats[name] = chosen
        changes = tuple(name for name in names if formats[name] != before[name])
        entry = StageFormats(stage=stage, formats=dict(formats), changes=changes, idle=tuple(idle))
        result.append(entry)
    return result


def _could_match(pattern: str, names: Collection[str]) -> bool:
    """Whether it is blocks that a longer stack would have, and this model has a stack."""
    if not pattern.startswith("blocks["):
        return False
    rest = pattern.partition("]")[2]
    return bool(matching(f"blocks[:]{rest}", list(names)))


def _no_match(pattern: str, names: Collection[str]) -> str:
    if pattern.startswith("blocks[") and not stacks(names):
        return (
            f"pattern {pattern!r} matches no layer: no module of this model has numbered blocks;"
            f" write globs instead, e.g. {next(iter(names), '*')!r}"
        )
    if pattern.startswith("blocks["):
        return f"pattern {pattern!r} matches no layer of the blocks of {', '.join(stacks(names))}"
    return no_match_message(pattern, names)
