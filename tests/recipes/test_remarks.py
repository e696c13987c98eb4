"""Recipes on models they were not written for: thirds, stages without effect, never in FP8."""

from __future__ import annotations

import pytest

from lightning_fp import recipes
from lightning_fp.recipes import (
    RolloutRecipe,
    Stage,
    StageFormats,
    formats_by_stage,
    never_low,
    remarks_on,
)


def over(recipe: RolloutRecipe, *names: str, order: tuple[str, ...] = ()) -> list[StageFormats]:
    configured = {**dict.fromkeys(names, "fp8-delayed"), "head": "bf16"}
    return formats_by_stage(recipe, configured, high="bf16", order=order)


def low(entry: StageFormats) -> list[str]:
    return [name for name, format in entry.formats.items() if format != "bf16"]


@pytest.mark.parametrize("name", sorted(set(recipes.names()) - {"fp16-rl"}))
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_built_in_recipes_work_on_any_model(name: str, count: int) -> None:
    stages = over(recipes.get(name), *(f"fc{i}" for i in range(count)))
    assert not stages[0].skipped
    reached = [entry for entry in stages if not entry.skipped and low(entry)]
    assert bool(reached) == (name != "first-last-bf16" or count > 2)


def test_thirds_in_the_order_in_which_layers_run() -> None:
    names = ("out", "fc2", "fc1")  # as the model defines them
    ends = over(recipes.get("first-last-bf16"), *names, order=("fc1", "fc2", "out"))
    assert low(ends[0]) == ["fc2"]
    (said,) = remarks_on(recipes.get("first-last-bf16"), ends, order_known=True)
    assert said == (
        "recipe 'first-last-bf16': the model has no numbered blocks; instead it takes thirds of the"
        " converted layers, as they run: first fc1; middle fc2; last out"
    )


def test_few_blocks_are_no_blocks_and_four_are() -> None:
    recipe = recipes.get("first-last-bf16")
    few = over(recipe, *(f"blocks.{i}.{part}" for i in range(2) for part in ("up", "down")))
    assert low(few[0]) == ["blocks.0.down", "blocks.1.up"]
    assert "has 2 numbered blocks, fewer than 4; instead" in remarks_on(recipe, few)[0]
    four = over(recipe, *(f"blocks.{i}.{part}" for i in range(4) for part in ("up", "down")))
    assert low(four[0]) == [f"blocks.{i}.{part}" for i in (1, 2) for part in ("up", "down")]
    assert remarks_on(recipe, four) == []


def test_a_stage_that_changes_nothing_is_skipped_unless_it_is_there_to_wait() -> None:
    balanced = over(recipes.get("balanced"), "fc1", "fc2")
    assert [entry.skipped for entry in balanced] == [False, True, False]
    assert remarks_on(recipes.get("balanced"), balanced)[1:] == [
        "stage 'all-but-ends' is skipped: it changes nothing on this model"
    ]
    waits = RolloutRecipe(
        name="waits",
        stages=(
            Stage(name="high", layers={"*": "high"}, until={"steps": 1}),
            Stage(name="still-high", layers={"*": "high"}, until={"loss": 3.0}),
            Stage(name="all", layers={"*": "configured"}),
        ),
    )
    assert not any(entry.skipped for entry in over(waits, "fc1"))


def test_never_in_low_precision_is_said() -> None:
    configured = {"fc1": "fp8-delayed", "fc2": "fp8-delayed"}
    ends = recipes.get("first-last-bf16")
    assert never_low(ends, over(ends, "fc1", "fc2"), configured).startswith(
        "recipe 'first-last-bf16' leaves all layers of this model in high precision to the end; "
    )
    assert never_low(ends, over(ends, "fc1", "fc2", "fc3"), configured) == ""
    all_high = over(ends, "fc1", "fc2")
    assert never_low(ends, all_high, dict.fromkeys(configured, "bf16")) == ""
