"""What a recipe comes to on a model, where that is no mistake and perhaps not meant either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_fp.layers.format import linear_format
from lightning_fp.layers.layer_names import fold_names
from lightning_fp.recipes.blocks import stacks
from lightning_fp.recipes.format_evidence import what_evidence_cannot_say
from lightning_fp.recipes.recipe import RolloutRecipe
from lightning_fp.recipes.stage_formats import StageFormats

_NAMED = 3
"""Layers that a line names of each third; of more it gives the number."""


def remarks_on(
    recipe: RolloutRecipe, stages: Sequence[StageFormats], *, order_known: bool = False
) -> list[str]:
    """What a user should hear before the first step, each in a line.

    Args:
        recipe: the recipe.
        stages: the recipe over the model, see `formats_by_stage`.
        order_known: whether the order is known in which the layers run.
    """
    remarks: list[str] = []
    if any(pattern.startswith("blocks[") for s in recipe.stages for pattern in s.layers):
        remarks += _on_thirds(recipe, stages[0], order_known)
    remarks += [
        f"{entry.stage} is skipped: it changes nothing on this model"
        for entry in stages
        if entry.skipped
    ]
    if recipe.evidence:
        remarks += what_evidence_cannot_say(used_formats(stages))
    return remarks


def used_formats(stages: Sequence[StageFormats]) -> set[str]:
    """All formats that a recipe comes to on a model."""
    return {name for entry in stages if not entry.skipped for name in entry.formats.values()}


def never_low(
    recipe: RolloutRecipe, stages: Sequence[StageFormats], configured: Mapping[str, str]
) -> str:
    """A line where low precision was asked for and no stage comes to it; "" otherwise.

    Args:
        recipe: the recipe.
        stages: the recipe over the model.
        configured: the format that the plugin's configuration gives each layer.
    """
    if not _low(configured) or any(_low(entry.formats) for entry in stages):
        return ""
    return (
        f"recipe {recipe.name!r} leaves all layers of this model in high precision to the end;"
        " leave StagedRollout out, or take another recipe"
    )


def _low(formats: Mapping[str, str]) -> bool:
    return any(map(_is_low, set(formats.values())))


def _is_low(name: str) -> bool:
    try:
        return not linear_format(name).is_high_precision
    except ValueError:  # a library's own, which only the plugin knows
        return True


def _on_thirds(recipe: RolloutRecipe, entry: StageFormats, order_known: bool) -> list[str]:
    if "" not in entry.blocks.stacks:
        return []
    count = len(next(iter(stacks(entry.formats).values()), ()))
    has = f"{count} numbered blocks, fewer than 4" if count else "no numbered blocks"
    parts = [
        f"{which} {_listed([name for name, at in entry.blocks.places.items() if at[1] == number])}"
        for number, which in enumerate(("first", "middle", "last"))
    ]
    how = "as they run" if order_known else "as the model defines them"
    return [
        f"recipe {recipe.name!r}: the model has {has}; instead it takes thirds of the converted"
        f" layers, {how}: {'; '.join(parts)}"
    ]


def _listed(names: Sequence[str]) -> str:
    folded = fold_names(names)
    more = f" and {len(folded) - _NAMED} more" if len(folded) > _NAMED else ""
    return ", ".join(folded[:_NAMED]) + more if folded else "none"
