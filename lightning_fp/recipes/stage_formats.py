"""A recipe over a model: which layer has which format in each of its stages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lightning_fp.layers.rules import no_match_message
from lightning_fp.recipes.blocks import FEW, Blocks, blocks_of, matching, stacks, thirds_of
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

    blocks: Blocks
    """What `blocks[...]` counts."""

    skipped: bool = False
    """Whether it comes to nothing on this model: another stage before has the same formats. One
    that repeats the layers of the stage before on purpose, to wait in them, is not."""


def formats_by_stage(
    recipe: RolloutRecipe,
    configured: Mapping[str, str],
    *,
    high: str,
    movable: Collection[str] | None = None,
    order: Sequence[str] = (),
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
        order: layers in the order in which they run, if that is known; see `blocks_in`.

    Returns:
        One entry for each stage.

    Raises:
        ValueError: for a pattern that matches no layer, naming the stage.
    """
    names = list(configured)
    if movable is None:
        movable = {name for name, format in configured.items() if format != high}
    formats = dict(configured)
    blocks = blocks_in(recipe, names, movable, order)
    result: list[StageFormats] = []
    for index, stage in enumerate(recipe.stages):
        before, decided, idle = dict(formats), set[str](), list[str]()
        for pattern, format in stage.layers.items():
            matched = matching(pattern, names, blocks)
            if not matched and not _could_match(pattern, names, blocks):
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
        waits = index == 0 or stage.layers == recipe.stages[index - 1].layers
        result.append(
            StageFormats(
                stage=stage,
                formats=dict(formats),
                changes=changes,
                idle=tuple(idle),
                blocks=blocks,
                skipped=not changes and not waits,
            )
        )
    return result


def blocks_in(
    recipe: RolloutRecipe,
    names: Sequence[str],
    movable: Collection[str],
    order: Sequence[str] = (),
) -> Blocks:
    """What a recipe's `blocks[...]` counts in a model: numbered blocks, or thirds of its layers.

    Args:
        recipe: the recipe.
        names: all layers, in the order of the model.
        movable: those of which thirds are made.
        order: layers in the order in which they run; what it lacks comes last.
    """
    blocks = blocks_of(names)
    if recipe.few_blocks == "refuse" or len(next(iter(blocks.stacks.values()), ())) >= FEW:
        return blocks
    place = {name: index for index, name in enumerate(order)}
    ran = sorted(names, key=lambda name: place.get(name, len(place)))
    return thirds_of([name for name in ran if name in movable])


def _could_match(pattern: str, names: Sequence[str], blocks: Blocks) -> bool:
    """Whether it is blocks that a model with more of them would have, and this one has some."""
    if not pattern.startswith("blocks["):
        return False
    rest = pattern.partition("]")[2]
    return bool(matching(f"blocks[:]{rest}", names, blocks))


def _no_match(pattern: str, names: Collection[str]) -> str:
    if pattern.startswith("blocks[") and not stacks(names):
        return (
            f"pattern {pattern!r} matches no layer: no module of this model has numbered blocks;"
            f" write globs instead, e.g. {next(iter(names), '*')!r}"
        )
    if pattern.startswith("blocks["):
        return f"pattern {pattern!r} matches no layer of the blocks of {', '.join(stacks(names))}"
    return no_match_message(pattern, names)
